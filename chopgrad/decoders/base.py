"""A video VAE's decoder seen as a recurrence: ``(frames, state) = step(latent_group, state)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from chopgrad.recurrence import Blocks, Checkpoint, Features, Group, Piece, Recurrence, State, unpatched


class FrameGroup(NamedTuple):
    """One step of a decoder: which latents it takes and which video frames it yields."""

    latents: slice
    frames: slice

    @property
    def frame_count(self) -> int:
        return self.frames.stop - self.frames.start

    @property
    def takes(self) -> slice:
        return self.latents

    @property
    def yields(self) -> slice:
        return self.frames


class CausalDecoder(Recurrence):
    """A video VAE's decoder as a pure recurrence over frame groups (arXiv 2603.17812, Sec. 3.1).

    To support a new VAE write this class's abstract methods, and either ``blocks`` or ``step``, in one file, and
    register it with ``chopgrad.register_decoder``; ``chopgrad.testing.check_decoder`` then checks it against the VAE's
    own decode.

    Args:
        vae: the diffusers model, used in place: nothing is copied and no module attribute is changed.
        clamp: apply the clamp to [-1, 1] with which some VAEs end their decode. It zeroes the gradient of saturated
            pixels, as it does in the VAE's own decode; False leaves it out.
        checkpoint: recompute parts of a step in the backward pass, in every graph; the gradient is the same.
            ``"block"`` keeps only what enters each resolution level, ``"residual"`` what enters each residual block,
            attention and upsampler: one more forward pass, and less memory for strategies that keep whole groups.
            ``"frame"`` recomputes norms, activations and Wan's spatial upsampling, frame by frame unless they are mixed
            (CogVideoX's norm): it lowers the peak of a single piece too, and so goes with ``pieces=True``. ``"auto"``:
            ``"frame"`` where pieces are walked, but for classes whose norms keep their input only, else None.
    """

    part = "decoder"
    entering = "latents"
    layout = "[batch, channels, latent_frames, h, w]"
    own_methods: ClassVar[tuple[str, ...]] = ("decode", "_decode")

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, checkpoint)
        self.clamp = clamp

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents that ``step`` takes."""

    @abstractmethod
    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        """The groups that ``latent_frames`` latents decode in, in order. Their frames tile the video exactly; their
        latents cover all latents in order, and may overlap.

        Raises:
            ValueError: when the decoder cannot decode that many latents.
        """

    @property
    def source_channels(self) -> int:
        return self.latent_channels

    def groups(self, length: int) -> Sequence[Group]:
        return self.frame_groups(length)

    @abstractmethod
    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents in the diffusion model's normalised space -> the VAE's own space, as the pipelines do it."""

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """Inverse of ``denormalize``: what the VAE encodes -> what the diffusion model sees."""

    def own_decode(self, latents: Tensor) -> Tensor:
        """The frames of the VAE's own ``decode``, of which this decoder is the recurrence; also where it is patched."""
        return unpatched(self.vae, "decode")(latents, return_dict=False)[0]

    def own(self, x: Tensor) -> Tensor:
        return self.own_decode(x)

    def answer(self, decode: Callable[[Tensor], Tensor], z: Tensor, return_dict: bool = True) -> Any:
        """What stands in place of the VAE's own ``decode`` (``chopgrad.patch``): the same arguments and results.

        Args:
            decode: latents -> frames.
            z, return_dict: those of the call.
        """
        sliced = getattr(self.vae, "use_slicing", False) and z.shape[0] > 1
        frames = torch.cat([decode(part) for part in (z.split(1) if sliced else (z,))])
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def frame_count(self, latent_frames: int) -> int:
        """Number of video frames that ``latent_frames`` latents decode to."""
        return self.frame_groups(latent_frames)[-1].frames.stop

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [batch, channels, latent_frames, h, w] by the recurrence; equals the VAE's own decode."""
        return self.run(latents)

    def clamped(self, frames: Tensor) -> Tensor:
        """Frames with the clamp that was asked for: the end of a step where the VAE's decode clamps."""
        return frames.clamp(-1.0, 1.0) if self.clamp else frames


def check_latent_frames(latent_frames: int) -> None:
    """Raises:
    ValueError: there are none.
    """
    if latent_frames < 1:
        raise ValueError(f"At least one latent frame is needed, got {latent_frames}.")


__all__ = [
    "Blocks",
    "CausalDecoder",
    "Checkpoint",
    "Features",
    "FrameGroup",
    "Piece",
    "State",
    "check_latent_frames",
]
