"""Peak memory of one strategy at one length, followed on tensors without data and extrapolated from shorter videos."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chopgrad.decode import decode
from chopgrad.decoders import CausalDecoder
from chopgrad.loss import frame_loss
from chopgrad.memory import LiveStorages
from chopgrad.strategies import Exact, Strategy

FramesLoss = Literal["streamed", "whole"]
"""What a loss sees: the frames of one group at a time (``frame_loss``), or the whole video (``decode``)."""
Peaks = tuple[int, int]
"""(device, host) bytes."""


@dataclass(eq=False)
class Setting:
    """Everything but strategy and length."""

    decoder: CausalDecoder
    latent_size: tuple[int, int]
    size: tuple[int, int]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    frames_loss: FramesLoss
    dtype: torch.dtype

    def peaks(self, strategy: Strategy, latent_frames: int) -> Peaks:
        """What it takes beyond the weights."""
        settings = strategy.plan()
        groups = self.decoder.frame_groups(latent_frames)
        if settings.every is not None and settings.every > 1:
            device, host = self.peaks(Exact(settings.offload, pieces=settings.pieces), latent_frames)
            kept = ceil(len(groups) / settings.every) + min(settings.every, len(groups))
            dropped = max(0, len(groups) - kept) * self._state_bytes()
            return (device, host - dropped) if settings.offload else (device - dropped, host)
        step = groups[-1].latents.stop - groups[-1].latents.start
        if settings.block is None:
            enough = 4 + settings.recompute
        else:
            # With Wan the first two groups are smaller than the others, with CogVideoX none is, but the first has no
            # state; then come the first window of full size and the group that it hands its state to.
            begin = 2 if groups[0].frame_count < groups[-1].frame_count else 1
            enough = (ceil(begin / settings.block) + 1) * settings.block + settings.distance + 1
        beyond = len(groups) - enough
        if beyond <= 1:
            return _highest(self._run(strategy, latent_frames))
        short = self._run(strategy, latent_frames - step * beyond)
        if settings.block is not None and self.frames_loss == "streamed":
            # Forward and backward pass alternate, and only latents and their gradient are as long as the video.
            device, host = _highest(short)
            return device + beyond * 2 * step * self._latents(1).nbytes, host
        longer = self._run(strategy, latent_frames - step * (beyond - 1))
        phases = zip(short, longer, strict=True)
        return _highest([(a + beyond * (c - a), b + beyond * (d - b)) for (a, b), (c, d) in phases])

    @lru_cache  # noqa: B019  (lives as long as the call of plan)
    def _run(self, strategy: Strategy, latent_frames: int) -> list[Peaks]:
        """The peaks of each phase: until the frames have their adjoints, and after; of a whole video's loss more."""
        decoder, z = self.decoder, self._latents(latent_frames).requires_grad_()
        sources = [z, *(p for p in decoder.parameters() if p.requires_grad)]
        last = decoder.frame_groups(latent_frames)[-1].frames
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

    def _latents(self, latent_frames: int) -> Tensor:
        return torch.zeros(1, self.decoder.latent_channels, latent_frames, *self.latent_size, dtype=self.dtype)

    @lru_cache  # noqa: B019
    def _state_bytes(self) -> int:
        """Of the state after some groups, which is as large as any."""
        z, state = self._latents(6), self.decoder.initial_state()
        with torch.no_grad():
            for group in self.decoder.frame_groups(z.shape[2]):
                _, state = self.decoder.step(z[:, :, group.latents], state)
        return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor))


def _highest(phases: Sequence[Peaks]) -> Peaks:
    device, host = (max(peaks) for peaks in zip(*phases))
    return device, host
