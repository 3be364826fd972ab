"""Peak memory of one strategy at one length, followed on tensors without data and extrapolated from shorter videos."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chopgrad.decode import decode
from chopgrad.decoders import CausalDecoder
from chopgrad.encode import encode
from chopgrad.encoders import CausalEncoder
from chopgrad.loss import frame_loss
from chopgrad.memory import LiveStorages
from chopgrad.planner.formulas import Surroundings
from chopgrad.planner.ledger import Ledger
from chopgrad.recurrence import Recurrence
from chopgrad.shapes import ShapesOnly
from chopgrad.strategies import Exact, Strategy

FramesLoss = Literal["streamed", "whole"]
"""What a loss sees: the frames of one group at a time (``frame_loss``), or the whole video (``decode``)."""
Peaks = tuple[int, int]
"""(device, host) bytes."""


@dataclass(eq=False)
class Setting(ABC):
    """Everything but strategy and length."""

    model: Recurrence
    source_size: tuple[int, int]
    """Height and width of what the model takes."""
    dtype: torch.dtype

    streams: ClassVar[bool] = False
    """Forward and backward pass alternate, group by group."""

    of_source: ClassVar[bool] = True
    """The source's gradient is wanted."""

    @abstractmethod
    def surroundings(self, length: int) -> Surroundings:
        """What is on the device beside the sweep."""

    def _gradient_bytes(self, source_bytes: int) -> int:
        """Those of parameters are added up: one more is there for a moment."""
        trained = [p.nbytes for p in self.model.parameters() if p.requires_grad]
        return source_bytes * self.of_source + sum(trained)

    @abstractmethod
    def run(self, strategy: Strategy, length: int) -> list[Peaks]:
        """The peaks of each phase."""

    def peaks(self, strategy: Strategy, length: int) -> Peaks:
        """What it takes beyond the weights."""
        settings = strategy.plan()
        groups = self.model.groups(length)
        step = _length(groups[-1].takes)
        if settings.every is not None and settings.every > 1:
            device, host = self.peaks(Exact(settings.offload, pieces=settings.pieces), length)
            kept = ceil(len(groups) / settings.every) + min(settings.every, len(groups))
            state_bytes = self._state_bytes(length - step * max(0, len(groups) - 4))
            dropped = max(0, len(groups) - kept) * state_bytes
            return (device, host - dropped) if settings.offload else (device - dropped, host)
        if settings.block is None:
            enough = 4 + settings.recompute
        else:
            # With Wan the first two groups are smaller than the others, with CogVideoX none is, but the first has no
            # state; then come the first window of full size and the group that it hands its state to.
            first, last = ((_length(group.takes), _length(group.yields)) for group in (groups[0], groups[-1]))
            begin = 2 if first[0] < last[0] or first[1] < last[1] else 1
            enough = (ceil(begin / settings.block) + 1) * settings.block + settings.distance + 1
        beyond = len(groups) - enough
        if beyond <= 1:
            return highest(self.run(strategy, length))
        short = self.run(strategy, length - step * beyond)
        if settings.block is not None and self.streams:
            # Only the source and its gradient are as long as the video.
            device, host = highest(short)
            return device + beyond * 2 * step * self.source(1).nbytes, host
        longer = self.run(strategy, length - step * (beyond - 1))
        phases = zip(short, longer, strict=True)
        return highest([(a + beyond * (c - a), b + beyond * (d - b)) for (a, b), (c, d) in phases])

    def source(self, length: int) -> Tensor:
        """What the model takes, without data."""
        return torch.zeros(1, self.model.source_channels, length, *self.source_size, dtype=self.dtype)

    @lru_cache  # noqa: B019
    def _state_bytes(self, length: int) -> int:
        """Of the state after so many; after some groups it is as large as any."""
        source, state = self.source(length), self.model.initial_state()
        with torch.no_grad():
            for group in self.model.groups(length):
                _, state = self.model.step(source[:, :, group.takes], state)
        return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor))


@dataclass(eq=False)
class DecoderSetting(Setting):
    """Latents to frames, and a loss of these.

    Attributes:
        size: height and width of a frame.
    """

    model: CausalDecoder
    size: tuple[int, int]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    frames_loss: FramesLoss

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.frames_loss == "streamed"

    def surroundings(self, length: int) -> Surroundings:
        groups = self.model.frame_groups(length)
        count = max(group.frame_count for group in groups) if self.streams else groups[-1].frames.stop
        with Ledger() as ledger, torch.device("meta"):
            frames = torch.zeros(1, 3, count, *self.size, dtype=self.dtype, requires_grad=True)
            ledger.begin()
            start = ledger.live
            target = torch.zeros(1, 3, count, *self.size, dtype=self.dtype)
            torch.autograd.grad(self.loss_fn(frames, target), frames)
            loss_bytes = ledger.peak - start
            source_bytes = self.source(length).nbytes
        return Surroundings(
            self.streams, loss_bytes, 0 if self.streams else 3 * frames.nbytes, self._gradient_bytes(source_bytes)
        )

    @lru_cache  # noqa: B019  (lives as long as the call of plan)
    def run(self, strategy: Strategy, length: int) -> list[Peaks]:
        """The peaks of each phase: until the frames have their adjoints, and after; of a whole video's loss more."""
        decoder, z = self.model, self.source(length).requires_grad_()
        sources = [z, *(p for p in decoder.parameters() if p.requires_grad)]
        last = decoder.frame_groups(length)[-1].frames
        phases: list[Peaks] = []

        def target(frames: slice) -> Tensor:
            return torch.zeros(1, 3, frames.stop - frames.start, *self.size, dtype=self.dtype)

        def end_phase(adjoint: Tensor | None = None) -> None:
            phases.append((storages.peak["meta"] + z.nbytes, storages.peak["cpu"]))
            storages.peak = defaultdict(int, storages.live)

        def of_group(frames: Tensor, part: tuple[Tensor, slice]) -> Tensor:
            if part[1] == last:
                frames.register_hook(end_phase)
            return self.loss_fn(frames, part[0])

        with LiveStorages() as storages, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parameters get gradients too is what was asked for
            if self.frames_loss == "streamed":
                loss = frame_loss(decoder, z, lambda at: (target(at), at), of_group, strategy)
            else:
                whole = target(slice(0, last.stop))
                frames = decode(decoder, z, strategy)
                end_phase()
                frames.register_hook(end_phase)
                loss = self.loss_fn(frames, whole)
                end_phase()
            torch.autograd.grad(loss, sources)
            end_phase()
        return phases


@dataclass(eq=False)
class EncoderSetting(Setting):
    """Frames to moments, and their mean as the loss.

    Attributes:
        of_video: the video's gradient is wanted.
    """

    model: CausalEncoder
    of_video: bool

    @property
    def of_source(self) -> bool:  # type: ignore[override]
        return self.of_video

    def surroundings(self, length: int) -> Surroundings:
        groups = self.model.groups(length)
        with torch.no_grad(), ShapesOnly(), torch.device("meta"):
            source = self.source(length)
            some, _ = self.model.step(source[:, :, groups[0].takes], self.model.initial_state())
        moments = some.nbytes // some.shape[2] * groups[-1].yields.stop  # which wait, as does their adjoint
        return Surroundings(False, 0, 2 * moments, self._gradient_bytes(source.nbytes))

    @lru_cache  # noqa: B019
    def run(self, strategy: Strategy, length: int) -> list[Peaks]:
        """The peaks of each phase: the forward pass, the loss, the backward pass."""
        video = self.source(length).requires_grad_(self.of_video)
        sources = [*([video] if self.of_video else []), *(p for p in self.model.parameters() if p.requires_grad)]
        phases: list[Peaks] = []

        def end_phase(adjoint: Tensor | None = None) -> None:
            phases.append((storages.peak["meta"] + video.nbytes, storages.peak["cpu"]))
            storages.peak = defaultdict(int, storages.live)

        with LiveStorages() as storages, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that both get gradients is what was asked for
            moments = encode(self.model, video, strategy)
            end_phase()
            moments.register_hook(end_phase)
            torch.autograd.grad(moments.mean(), sources)
            end_phase()
        return phases


def highest(phases: Sequence[Peaks]) -> Peaks:
    """The peak over all phases."""
    device, host = (max(peaks) for peaks in zip(*phases))
    return device, host


def _length(part: slice) -> int:
    return part.stop - part.start
