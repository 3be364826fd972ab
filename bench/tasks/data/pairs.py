"""The clips of a task, made once: 8-bit frames as a video file would hold them, and their latents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

import suite.clips
import suite.films
import suite.motion
from bench.tasks.task import Task
from chopgrad import CausalDecoder
from suite.progress import track
from suite.sizes import latent_frames

CODE = (
    "task", "super_resolution", "deblurring", "inpainting", "artifact_removal", "driving", "data/pairs",
    "data/degradation", "data/compression", "data/footage", "scenes/room", "scenes/raycast", "scenes/splats",
    "scenes/road",
)  # fmt: skip
"""Modules that decide what a clip looks like."""


@dataclass(frozen=True)
class ClipShape:
    """Frames, height and width of a clip in pixels."""

    frames: int
    height: int
    width: int


class Pairs(Dataset[dict[str, Tensor]]):
    """Clips of a task by number, each made when first asked for and kept in ``cache``.

    An item holds ``condition`` and ``target`` (uint8 [3, frames, H, W]) and ``condition_latents``, ``latents``
    ([channels, latent frames, h, w] in the diffusion model's normalised space, float32).

    Args:
        task: what the clips are.
        decoder: of the VAE that encodes them; on the device where it is to do so.
        vae_key: says which VAE it is, for the cache.
        seeds: numbers of the clips.
        cache: folder; None keeps nothing.

    Raises:
        ValueError: the VAE does not decode to so many frames, or a clip cannot be made.
    """

    def __init__(
        self,
        task: Task,
        decoder: CausalDecoder,
        vae_key: str,
        seeds: Sequence[int],
        shape: ClipShape,
        cache: Path | None,
    ) -> None:
        self.task, self.decoder, self.seeds, self.shape, self.cache = task, decoder, list(seeds), shape, cache
        self.latent_frames = latent_frames(decoder, shape.frames)
        self.key = json.dumps([_described(task), vae_key, dataclasses.astuple(shape), clips_code(), torch.__version__])

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seed = self.seeds[index]
        path = self._path(seed)
        if path is not None and path.exists():
            return load_file(path)
        item = self._make(seed)
        if path is not None:
            _save(item, path)
        return item

    def prepare(self, label: str) -> None:
        """Make what is missing now, with a progress bar, so that a training step is a training step."""
        missing = [k for k, seed in enumerate(self.seeds) if (p := self._path(seed)) is None or not p.exists()]
        if self.cache is not None and missing:
            for k in track(missing, f"{self.task.name}: {label} clips"):
                self[k]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Several items, stacked."""
        items = [self[k] for k in rows]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def _path(self, seed: int) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(f"{seed} {self.key}".encode()).hexdigest()[:24]
        return self.cache / f"{name}.safetensors"

    def _make(self, seed: int) -> dict[str, Tensor]:
        pair = self.task.clip(seed, self.shape.frames, self.shape.height, self.shape.width)
        condition, target = to_bytes(pair.condition), to_bytes(pair.target)
        latents = [self._encode(from_bytes(x)) for x in (condition, target)]
        return {"condition": condition, "target": target, "condition_latents": latents[0], "latents": latents[1]}

    @torch.no_grad()
    def _encode(self, video: Tensor) -> Tensor:
        weight = next(iter(self.decoder.vae.parameters()))
        posterior = self.decoder.vae.encode(video[None].to(weight.device, weight.dtype)).latent_dist
        return self.decoder.normalize(posterior.mode())[0].float().cpu()


def to_bytes(video: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(video: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def clips_code() -> str:
    """Hash of all code that decides what a clip looks like, so that nothing is kept over a change."""
    modules = [Path(__file__).parents[1] / f"{name}.py" for name in CODE]
    modules += [Path(str(module.__file__)) for module in (suite.motion, suite.clips, suite.films)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()


@torch.no_grad()
def spatial_factor(vae: Any) -> int:
    """Pixels per latent along height and width, measured: configs name it differently."""
    weights = next(iter(vae.parameters()))
    size = 64
    frame = torch.zeros(1, 3, 1, size, size, device=weights.device, dtype=weights.dtype)
    return size // vae.encode(frame).latent_dist.mode().shape[-1]


def vae_key(vae: Any) -> str:
    """Names a VAE and its weights, for what is kept of it."""
    digest = hashlib.sha256(type(vae).__name__.encode())
    for name, tensor in sorted(vae.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
    digest.update(str(next(vae.parameters()).dtype).encode())
    return digest.hexdigest()[:24]


def _described(task: Task) -> dict[str, Any]:
    values = {k: str(v) for k, v in dataclasses.asdict(task).items() if k not in ("losses", "cache", "name")}
    if task.folder is not None:  # other films in the same folder are other clips
        files = [p for p in sorted(Path(task.folder).rglob("*")) if p.is_file()]
        values["films"] = str([(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in files])
    return values


def _save(item: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all: two processes may want the same clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in item.items()}, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
