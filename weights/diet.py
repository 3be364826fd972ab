"""Training samples, made by the run's own process or ahead by others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from suite.clips import to_unit
from suite.motion import moving_clip
from weights.data import installed, read
from weights.settings import Config, batch_shape


class Diet:
    """Training samples: crops of real video and generated motion, seeded by step so that a resumed run is the same."""

    def __init__(self, config: Config) -> None:
        self.config = config
        footage = read(config.data, config.clip_height) if config.data else installed(config.clip_height)
        self.videos = [_in_half_precision(frames) for frames in footage.clips]
        self.photographs = footage.photographs

    def batch(self, step: int, batch: int, frames: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return torch.stack([self._sample(generator, frames) for _ in range(batch)])

    def batches(self, start: int) -> Iterator[Tensor]:
        """Those of the steps from ``start`` on, [samples, 3, frames, size, size]; with workers, made ahead."""
        steps = range(start, self.config.steps)
        if not self.config.workers:
            yield from (self.batch(step, *batch_shape(self.config, step)) for step in steps)
            return
        ahead: DataLoader = DataLoader(
            Ahead(self.config), batch_size=None, sampler=((step, *batch_shape(self.config, step)) for step in steps),
            num_workers=self.config.workers, collate_fn=as_it_is, multiprocessing_context="forkserver",
            worker_init_fn=leave_signals_to_the_run,
        )  # fmt: skip
        for step, made in zip(steps, ahead):
            shape = batch_shape(self.config, step)  # a run that fills its minutes may have chosen another since
            yield torch.from_numpy(made) if (len(made), made.shape[2]) == shape else self.batch(step, *shape)

    def _sample(self, generator: torch.Generator, frames: int) -> Tensor:
        size = self.config.size
        if torch.rand((), generator=generator) >= self.config.real_share:
            objects = int(torch.randint(0, 3, (), generator=generator)) if frames > 1 else 0
            return moving_clip(generator, frames, size, size, objects, self.photographs)
        video = self.videos[torch.randint(len(self.videos), (), generator=generator)]
        stride = int(torch.randint(1, 3, (), generator=generator))
        span = (frames - 1) * stride + 1
        start = int(torch.randint(video.shape[1] - span + 1, (), generator=generator))
        # Log-uniform scale, from one video pixel per training pixel to the whole picture height.
        largest = min(video.shape[2:])
        crop = round(size * (largest / size) ** torch.rand((), generator=generator).item())
        top = int(torch.randint(video.shape[2] - crop + 1, (), generator=generator))
        left = int(torch.randint(video.shape[3] - crop + 1, (), generator=generator))
        clip = video[:, start : start + span : stride, top : top + crop, left : left + crop].float()
        if torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        clip = F.interpolate(clip.transpose(0, 1), size=(size, size), mode="bilinear", antialias=True)
        return clip.transpose(0, 1)


def _in_half_precision(frames: np.ndarray) -> Tensor:
    """uint8 [frames, H, W, 3] -> float16 [3, frames, H, W] in [-1, 1], one frame at a time."""
    video = torch.empty(frames.shape, dtype=torch.half).permute(3, 0, 1, 2)
    for k in range(len(frames)):
        video[:, k : k + 1] = to_unit(frames[k : k + 1])
    return video


class Ahead(Dataset):
    """The batch of a (step, samples, frames), for a process that makes them ahead.

    Each process reads the footage itself, and batches go through pipes: shared memory is scarce in containers, and a
    fork of a process with threads or a GPU's context may hang.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def diet(self) -> Diet:
        return Diet(self.config)

    def __getitem__(self, asked: tuple[int, int, int]) -> np.ndarray:
        return self.diet.batch(*asked).numpy()


def as_it_is(batch: Any) -> Any:
    return batch


def leave_signals_to_the_run(worker: int) -> None:
    """The run ends its workers itself, after it has saved; a signal to the whole group would end them before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
