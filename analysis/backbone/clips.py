"""Clips of the restoration task: generated motion and crops of films, and how they are degraded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.backbone.task_settings import TaskSettings
from suite.clips import TRAINING_CLIPS, packaged_clip, random_crop, read_frames, to_unit
from suite.motion import moving_clip

ZOOM = 1.5


@dataclass(frozen=True)
class Samples:
    """Clips of the task.

    Attributes:
        sources: what each clip was cut from; clips of one film are alike (clusters of an interval).
        clean: [clips, 3, frames, H, W] in [-1, 1].
        condition, latents: [clips, channels, latent frames, h, w], degraded and clean, in the diffusion model's
            normalised space.
    """

    sources: list[str]
    clean: Tensor
    condition: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice | Tensor) -> Samples:
        chosen = torch.arange(len(self))[rows].tolist()
        return Samples([self.sources[k] for k in chosen], self.clean[rows], self.condition[rows], self.latents[rows])


def clean_clips(
    count: int, settings: TaskSettings, generator: torch.Generator, seed: int, films: list[Path] | None
) -> tuple[list[str], Tensor]:
    """(sources, [count, 3, frames, H, W] in [-1, 1]); see ``Restoration.samples``.

    Raises:
        ValueError: a film has too few frames.
    """
    mixed = films is None
    films = training_films() if films is None else films
    sources, clean = [], []
    for k in range(count):
        if not films or (mixed and k % 2 == 0):
            sources.append(f"generated {seed}/{k}")
            clean.append(moving_clip(generator, settings.frames, settings.size, settings.size))
        else:
            film = films[(k // 2 if mixed else k) % len(films)]
            sources.append(film.name)
            clean.append(_film_crop(film, settings.frames, settings.size, generator))
    return sources, torch.stack(clean)


def training_films() -> list[Path]:
    """The films whose crops are half of the training diet."""
    return [packaged_clip(name) for name in TRAINING_CLIPS]


def degrade(video: Tensor, settings: TaskSettings, generator: torch.Generator) -> Tensor:
    """Blur, shrink, enlarge, add noise: the degradation of super-resolution training, on [clips, 3, frames, H, W]."""
    frames = video.transpose(1, 2).flatten(0, 1)
    if settings.blur > 0:
        reach = max(1, round(3 * settings.blur))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / settings.blur) ** 2).to(video)
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        frames = F.conv2d(F.pad(frames, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3)
        frames = F.conv2d(F.pad(frames, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3), groups=3)
    if settings.shrink > 1:
        small = [max(1, n // settings.shrink) for n in frames.shape[-2:]]
        small_frames = F.interpolate(frames, size=small, mode="bicubic", antialias=True)
        frames = F.interpolate(small_frames, size=video.shape[-2:], mode="bicubic")
    frames = frames + settings.noise * torch.randn(frames.shape, generator=generator).to(video)
    return frames.clamp(-1, 1).unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


def _film_crop(film: Path, frames: int, size: int, generator: torch.Generator) -> Tensor:
    video = _small_film(film, round(ZOOM * size))
    if video.shape[1] < frames:
        raise ValueError(f"'{film.name}' has {video.shape[1]} frames, but {frames} are needed: pass longer clips.")
    start = int(torch.randint(video.shape[1] - frames + 1, (), generator=generator))
    return random_crop(video[:, start : start + frames], size, size, generator, ZOOM)


@lru_cache(maxsize=8)
def _small_film(film: Path, short_side: int) -> Tensor:
    """[3, frames, H, W] of a whole film with its shorter side shrunk, some frames at a time: films are large."""
    raw = read_frames(film)
    factor = min(1.0, short_side / min(raw.shape[1:3]))
    size = [max(short_side, round(n * factor)) if factor < 1 else n for n in raw.shape[1:3]]
    parts = []
    for k in range(0, len(raw), 16):
        part = to_unit(raw[k : k + 16]).transpose(0, 1)
        parts.append(F.interpolate(part, size=size, mode="bicubic", antialias=True).clamp(-1, 1).transpose(0, 1))
    return torch.cat(parts, dim=1)
