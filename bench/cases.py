"""What is measured: a VAE, a video size, a loss, and how the loss is differentiated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

import torch

from bench.baselines import BASELINES, Baseline, SavedOnCpu
from chopgrad import Chop, Exact, Full, Sampled, Strategy
from chopgrad.decoders import Checkpoint
from chopgrad.planner import ARCHITECTURES
from suite.vaes import EMBEDDED

FULL_SIZE = {f"full:{name}": name for name in ("wan2.1", "wan2.2", "cogvideox")}
"""The published architectures (``chopgrad.planner.ARCHITECTURES``), with random weights."""
assert set(FULL_SIZE.values()) <= set(ARCHITECTURES)


@dataclass(frozen=True)
class Inside:
    """A strategy on a decoder that recomputes parts of a group: ``decoder_for(vae, checkpoint=...)``."""

    checkpoint: Checkpoint
    strategy: Strategy


@dataclass(frozen=True)
class Whole:
    """A strategy under a loss on the whole video: ``chopgrad.decode``, and the loss on its frames."""

    strategy: Strategy


Method = Strategy | Inside | Whole | Baseline
"""How a loss is differentiated: a strategy of the library, or what people do without it."""

KEY_STRATEGIES: tuple[Strategy, ...] = (
    Full(),
    Exact(offload=False),
    Exact(offload=True),
    Exact(offload=True, pieces=True),
    Chop(0),
    Chop(1),
    Chop(1, block=8),
    Chop(1, block=8, recompute=True),
)
"""What a user chooses between first, and what the targets speak about."""

STRATEGIES: tuple[Strategy | Inside, ...] = (
    *KEY_STRATEGIES,
    Exact(pieces=True),
    Chop(2),
    Chop(4),
    Chop(1, block=4),
    Inside("residual", Full()),
    Inside("residual", Chop(1)),
    Inside("frame", Exact(pieces=True)),
    Inside("frame", Exact(offload=True, pieces=True)),
)

ESTIMATES: tuple[Sampled, ...] = (Sampled(2),)
"""Two of the losses, drawn anew at every call: unbiased for ``Chop(1)``."""

SWEEP: tuple[Strategy | Inside, ...] = tuple(
    dict.fromkeys(
        [
            *STRATEGIES,
            *(Chop(distance, block=block) for block in (1, 4, 8) for distance in (0, 1, 2, 4)),
            Chop(1, block=8, recompute=True, offload=True, pieces=True),
            Chop(1, block=8, offload=True),
            *ESTIMATES,
            Sampled(2, Exact(offload=False)),
        ]
    )
)
"""Distances 0, 1, 2, 4 times blocks 1, 4, 8. One block of all groups is ``Full`` (graphs kept) or ``Exact``."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        vae: name of an embedded decoder, or of a published architecture in ``FULL_SIZE`` with random weights (memory
            and time do not depend on the weights; the gradient's error does, so there it is not measured).
        frames, height, width: of the decoded video, in pixels.
        strategy: how the loss is differentiated: a strategy or a baseline.
    """

    vae: str
    frames: int
    height: int
    width: int
    strategy: Method
    loss: str = "mse"
    dtype: str = "float32"
    device: str = "cpu"
    trainable_decoder: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique, and a good file name."""
        words = [self.vae.replace(":", "-"), f"{self.frames}f", f"{self.height}x{self.width}", self.loss, self.dtype]
        words += ["decoder"] * self.trainable_decoder + [torch.device(self.device).type, slug(self.strategy)]
        return "-".join(words)

    @property
    def video(self) -> Case:
        """The same with ``Full()``: what the cases of one video have in common."""
        return replace(self, strategy=Full())

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "strategy": label(self.strategy)}


def plain(method: Method) -> Strategy | Baseline:
    """Without what the decoder recomputes inside a group, and wherever the loss is."""
    return method.strategy if isinstance(method, Inside | Whole) else method


def label(method: Method) -> str:
    """The method as written in code, without settings left at their default: ``Chop(1, block=4, recompute)``."""
    if isinstance(method, Inside):
        return f"{label(method.strategy)}, checkpoint={method.checkpoint}"
    if isinstance(method, Whole):
        return f"{label(method.strategy)}, decode"
    words, flags = [], []
    for field in fields(method):
        value = getattr(method, field.name)
        if field.default is MISSING:
            words.append(str(value))
        elif value is True:
            flags.append(field.name)
        elif isinstance(value, Strategy) and value != field.default:
            words.append(label(value))
        elif value != field.default:
            words.append(f"{field.name}={value}")
    return f"{type(method).__name__}({', '.join([*words, *flags])})"


def slug(method: Method) -> str:
    return re.sub("[^a-z0-9]+", "_", label(method).lower()).strip("_")


def is_exact(method: Method) -> bool:
    """Whether it gives the gradient of full back-propagation, by construction."""
    method = plain(method)
    return method.exact if isinstance(method, Baseline) else isinstance(method, Full | Exact)


def uses_host(method: Method) -> bool:
    """Whether part of the work waits in host memory: on a CPU there is nowhere to move it, so nothing to measure."""
    method = plain(method)
    return isinstance(method, SavedOnCpu) if isinstance(method, Baseline) else method.plan().offload


def window(strategy: Strategy, groups: int) -> tuple[int, int]:
    """(distance, block) of the gradient that it gives; of an estimate, on average."""
    inner = strategy.strategy if isinstance(strategy, Sampled) else strategy
    return (inner.distance, inner.block) if isinstance(inner, Chop) else (groups, 1)


def measurable(case: Case) -> bool:
    """Whether memory and time of the case can be measured on its device; what cannot is predicted."""
    return not (torch.device(case.device).type == "cpu" and uses_host(case.strategy))


def baselines(vae: str, height: int, width: int) -> list[Baseline]:
    """The baselines that work with this VAE at this size."""
    return [b for b in BASELINES if b.refusal(ARCHITECTURE[vae], height, width) is None]


def refusals(vae: str, height: int, width: int) -> list[str]:
    """Why the others do not, in sentences."""
    reasons = ((b, b.refusal(ARCHITECTURE[vae], height, width)) for b in BASELINES)
    return [f"{label(b)}: {reason}" for b, reason in reasons if reason is not None]


ARCHITECTURE = {name: name for name in EMBEDDED} | FULL_SIZE
"""VAE -> the published architecture that it has, or is a small version of."""


def frame_groups(architecture: str, frames: int) -> int:
    """Of a video: CogVideoX's have 8 frames, the first one 9; those of the others have 4, after one frame."""
    return (frames - 1) // 8 if architecture == "cogvideox" else 1 + (frames - 1) // 4


def videos(cases: Iterable[Case]) -> list[Case]:
    """One case with ``Full()`` per VAE, size, loss, dtype and number of frames."""
    return list(dict.fromkeys(c.video for c in cases))
