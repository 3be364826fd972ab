"""What an end task is: seeded pairs of a degraded and a clean clip, and the losses that fine-tuning takes."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

SMALLEST = 16


@dataclass(frozen=True)
class LossTerm:
    """One term of a task's loss.

    Attributes:
        loss: name in ``suite.losses``.
        space: ``"pixel"``: on decoded frames, through the decoder; ``"latent"``: on latents, past the decoder.
        weight: its factor.
    """

    loss: str
    space: Literal["pixel", "latent"]
    weight: float = 1.0


@dataclass(frozen=True)
class Pair:
    """One clip of a task.

    Attributes:
        condition, target: float32 [3, frames, H, W] in [-1, 1]: what the model is given and what it should return.
        mask: float32 [1, frames, H, W], 1 where the condition may differ from the target; outside it the two are
            equal to the last bit. None where the whole picture differs, or where that is not known.
        source: what the clip was made from. Clips of one film are alike: they are one cluster of an interval.
    """

    condition: Tensor
    target: Tensor
    mask: Tensor | None
    source: str


@dataclass(frozen=True)
class Task(abc.ABC):
    """A task, as a value: ``dataclasses.replace(task, folder=...)`` makes another one.

    Attributes:
        folder: real footage instead of the procedural generator; what lies in it, the subclass says.
        name: the key in ``TASKS``.
        losses: the terms that the paper takes for this task (arXiv 2603.17812, Sec. 4).
        trains_decoder: whether the decoder's parameters are fine-tuned too.
    """

    folder: Path | None = None
    name: str = field(default="", kw_only=True)
    losses: tuple[LossTerm, ...] = field(default=(), kw_only=True)
    trains_decoder: bool = field(default=False, kw_only=True)

    def clip(self, seed: int, frames: int, height: int, width: int) -> Pair:
        """The pair number ``seed``.

        All random numbers come from one CPU generator with this seed, so a seed means the same clip on every machine
        (up to the rounding of its floating-point unit). Train and test on disjoint seeds.

        Raises:
            ValueError: the seed or a size is out of range, or the footage does not fit.
        """
        if seed < 0 or frames < 1 or min(height, width) < SMALLEST:
            raise ValueError(
                f"A clip needs a seed of at least 0, at least 1 frame, and at least {SMALLEST} pixels in height and "
                f"width; got seed {seed}, {frames} frames, {height}x{width}."
            )
        self.check()
        with torch.no_grad():
            return self.make(seed, torch.Generator().manual_seed(seed), frames, height, width)

    def check(self) -> None:  # noqa: B027  (a task without settings of its own has nothing to check)
        """Raises ValueError with one sentence where a setting is out of range."""

    @abc.abstractmethod
    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        """The pair; the arguments have been checked."""

    def weight(self, space: str) -> dict[str, float]:
        """Loss names and their weights in one space."""
        return {term.loss: term.weight for term in self.losses if term.space == space}


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number between ``low`` and ``high``."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def pick(generator: torch.Generator, count: int) -> int:
    """One of 0, ..., count - 1."""
    return int(torch.randint(count, (), generator=generator))
