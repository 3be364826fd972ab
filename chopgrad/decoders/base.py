"""A causal-cache video decoder seen as a recurrence: ``(frames, state) = step(latent_group, state)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Any
"""A pytree whose tensor leaves are the causal cache; other leaves (None, markers) pass through untouched."""

Features = tuple[Tensor, ...]
"""What one piece of a step hands to the next: the main features first, then what a later piece needs (skips)."""

Piece = Callable[[Features, Any], tuple[Features, Any]]
"""A pure part of a step: ``(features, its slice of the state) -> (features, the slice for the next group)``."""


class FrameGroup(NamedTuple):
    """One step of the recurrence: which latents it takes and which video frames it yields."""

    latents: slice
    frames: slice

    @property
    def frame_count(self) -> int:
        return self.frames.stop - self.frames.start


class CausalDecoder(ABC):
    """A video VAE's decoder as a pure recurrence over frame groups (arXiv 2603.17812, Sec. 3.1).

    To support a new VAE write this class's abstract methods, and either ``pieces`` or ``step``, in one file and
    register it in ``chopgrad.decoders.DECODERS``; ``chopgrad.conformance.check_decoder`` then checks it against the
    VAE's own decode.

    Args:
        vae: the diffusers model, used in place: nothing is copied and no module attribute is changed.
        clamp: apply the clamp to [-1, 1] with which some VAEs end their decode. It zeroes the gradient of saturated
            pixels, so training often goes better without it.
    """

    def __init__(self, vae: nn.Module, clamp: bool = True) -> None:
        self.vae: Any = vae  # a diffusers model: its attributes are not typed
        self.clamp = clamp

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents that ``step`` takes."""

    @abstractmethod
    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        """The groups that ``latent_frames`` latents decode in, in order; they tile latents and frames exactly.

        Raises:
            ValueError: when the decoder cannot decode that many latents.
        """

    def pieces(self) -> list[Piece]:
        """The chain of pure pieces that ``step`` is, from ``(z,)`` to ``(frames,)``; the state has a slice for each.

        Small pieces lower the peak of strategies that walk them (``pieces=True``). A decoder that cannot be taken
        apart overrides ``step`` instead.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not composed of pieces: use a strategy without pieces=True."
        )

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one frame group.

        Pure: neither ``state`` nor the model is changed, so a step may be repeated to rebuild its graph.

        Args:
            z: [batch, channels, latents of the group, h, w], in the VAE's own latent space.
            state: what the step before returned, or ``initial_state()``.

        Returns:
            frames [batch, 3, frames of the group, H, W] and the state for the next group.
        """
        features: Features = (z,)
        after = []
        for piece, before in zip(self.pieces(), state, strict=True):
            features, new = piece(features, before)
            after.append(new)
        return features[0], tuple(after)

    @abstractmethod
    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents in the diffusion model's normalised space -> the VAE's own space, as the pipelines do it."""

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """Inverse of ``denormalize``: what the VAE encodes -> what the diffusion model sees."""

    def initial_state(self) -> State:
        """The state before the first group: an empty cache."""
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``step`` uses."""
        yield from self.vae.decoder.parameters()
        if self.vae.post_quant_conv is not None:
            yield from self.vae.post_quant_conv.parameters()

    def frame_count(self, latent_frames: int) -> int:
        """Number of video frames that ``latent_frames`` latents decode to."""
        return self.frame_groups(latent_frames)[-1].frames.stop

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [batch, channels, latent_frames, h, w] by the recurrence; equals the VAE's own decode."""
        state, frames = self.initial_state(), []
        for group in self.frame_groups(latents.shape[2]):
            x, state = self.step(latents[:, :, group.latents], state)
            frames.append(x)
        return torch.cat(frames, dim=2)

    def _finish(self, frames: Tensor) -> Tensor:
        return frames.clamp(-1.0, 1.0) if self.clamp else frames


def check_latent_frames(latent_frames: int) -> None:
    if latent_frames < 1:
        raise ValueError(f"At least one latent frame is needed, got {latent_frames}.")
