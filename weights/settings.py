"""Settings of a training run, and what follows from them for one step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from weights.budget import PACE_STEPS, Budget

UNDECIDED = 1_000_000_000
"""Clip steps of a run that fills its minutes, until it knows its pace."""


@dataclass
class Config:
    """Settings of a training run."""

    model: Literal["wan2.1", "cogvideox"]
    """Architecture: a narrow AutoencoderKLWan (2.1) or AutoencoderKLCogVideoX."""
    image_steps: int = 6000
    """Optimiser steps on single frames."""
    clip_steps: int = 1300
    """Optimiser steps on clips."""
    image_batch: int = 8
    clip_batch: int = 2
    clip_frames: int = 9
    """Frames of a training clip (half as many clips, of 17 frames, in the last fifth of the clip phase)."""
    size: int = 64
    """Height and width of the training crops in pixels."""
    image_lr: float = 1e-3
    clip_lr: float = 5e-4
    kl_weight: float = 1e-7
    error: Literal["squared", "log"] = "squared"
    """Mean squared error, or its logarithm per sample (PSNR), in which grass and gravel weigh no more than a face."""
    l1_weight: float = 0.2
    """Weight of the mean absolute error beside the mean squared error."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon orthogonalises the steps of convolution kernels; the rest stays with AdamW. One learning rate for both."""
    decay_share: float = 1.0
    """Last share of a phase in which the learning rate falls (half a cosine); it is constant before."""
    ema_decay: float = 0.0
    """Average the weights over about 1 / (1 - decay) steps, and write that average (0: the last weights)."""
    latent_channels: int = 32
    data: Path | None = None
    """File of weights/data.py to read instead of the installed clips and photographs."""
    clip_height: int = 0
    """Real clips of more rows are downscaled to so many (0: none is)."""
    real_share: float = 0.5
    """Share of training samples from real video; the rest is generated motion over photographs."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    mixed_precision: bool = False
    """Run convolutions in bfloat16 (autocast) and channels-last: 1.8 times faster where the processor has both."""
    threads: int = 0
    """CPU threads (0: PyTorch's default)."""
    workers: int = 0
    """Processes that prepare the samples ahead (0: none), for a device that need not wait for them. The samples are the
    same."""
    minutes: float | None = None
    """Stop in time, from the end of the imports on, with a checkpoint from which the same command goes on. None: no
    limit."""
    fill_minutes: bool = False
    """Choose clip_steps by the pace, so that the run is finished within the minutes."""
    checkpoint_every_seconds: float = 60.0
    start: Path | None = None
    """Finished model to go on from instead of random weights; it may have fewer latent channels. Its own record is kept
    in the new one."""
    snapshot_steps: tuple[int, ...] = ()
    """Optimiser steps (0: before training) at which the model is kept, in float32, in <run>/snapshots/step-<step>."""
    run: Path | None = None
    """Folder of checkpoints and the loss log. None: runs/<model>."""
    out: Path | None = None
    """Folder the finished model is written to. None: weights/tiny-<model>."""

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        if self.clip_frames % 8 != 1:
            raise ValueError(f"clip_frames must be 1 more than a multiple of 8, got {self.clip_frames}.")
        if outside := [n for n in self.snapshot_steps if not 0 <= n <= self.steps]:
            raise ValueError(f"snapshot_steps must lie within the run's {self.steps} steps, got {outside}.")
        if self.fill_minutes and (self.minutes is None or self.decay_share >= 1):
            raise ValueError("fill_minutes needs minutes, and a decay_share below 1: it chooses before the decay.")

    @property
    def steps(self) -> int:
        return self.image_steps + self.clip_steps

    def recorded(self) -> dict[str, Any]:
        """What decides the result, and how it was computed; no paths of the machine but ``start``."""
        left_out = ("run", "out", "data", "minutes", "fill_minutes", "workers")
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in left_out}


def learning_rate(config: Config, step: int) -> tuple[float, float]:
    """(learning rate of a step, share of its phase that is done): 100 steps of warm-up, constant, then half a cosine.

    It does not depend on the length of the phase before it falls: until then a run may be resumed with more steps.
    """
    images = step < config.image_steps
    steps, within = (config.image_steps, step) if images else (config.clip_steps, step - config.image_steps)
    done = within / steps
    decayed = max(0.0, 1 - (1 - done) / config.decay_share)
    fall = 0.02 + 0.98 * (1 + math.cos(math.pi * decayed)) / 2
    return (config.image_lr if images else config.clip_lr) * min(1.0, (within + 1) / 100) * fall, done


def batch_shape(config: Config, step: int) -> tuple[int, int]:
    """(samples, frames) of a step."""
    if step < config.image_steps:
        return config.image_batch, 1
    if learning_rate(config, step)[1] >= 0.8:
        return max(1, config.clip_batch // 2), 17
    return config.clip_batch, config.clip_frames


def clip_steps_to_fill(config: Config, step: int, budget: Budget) -> int | None:
    """How many clip steps fit into the budget; None before the learning rate would begin to fall, or with no pace yet.

    Steps that are too few or too many would not change what came before: until then the rate is constant.
    """
    within = step - config.image_steps
    if within < PACE_STEPS or not budget.pace:
        return None
    slower = 5 / ((config.clip_frames + 3) // 4)  # frame groups of the longer clips in the last fifth
    fitting = int((within + 0.9 * budget.left(budget.export) / budget.pace) / (0.8 + 0.2 * slower))
    constant = 1 - config.decay_share
    return max(fitting, math.ceil(within / constant)) if within >= constant * fitting else None
