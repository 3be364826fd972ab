"""A video VAE's encoder seen as a recurrence: ``(moments, state) = step(frame_group, state)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from chopgrad.recurrence import Blocks, Checkpoint, Features, Group, Piece, Recurrence, State, unpatched


class LatentGroup(NamedTuple):
    """One step of an encoder: which video frames it takes and which latents it yields the moments of."""

    frames: slice
    latents: slice

    @property
    def latent_count(self) -> int:
        return self.latents.stop - self.latents.start

    @property
    def takes(self) -> slice:
        return self.frames

    @property
    def yields(self) -> slice:
        return self.latents


class CausalEncoder(Recurrence):
    """A video VAE's encoder as a pure recurrence over groups of frames, as arXiv 2603.17812, Sec. 3.1, has it of the
    decoder.

    What it yields are the moments: mean and log-variance of each latent, along the channels. To support a new VAE write
    this class's abstract methods, and either ``blocks`` or ``step``, in one file, and register it with
    ``chopgrad.register_encoder``.

    Args:
        vae: the diffusers model, used in place: nothing is copied and no module attribute is changed.
        checkpoint: see ``CausalDecoder``.
    """

    part = "encoder"
    entering = "video"
    own_methods = ("encode", "_encode")

    def __init__(self, vae: nn.Module, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, checkpoint)
        self.layout = f"[batch, {self.source_channels}, frames, height, width]"
        self.row_unit = self.spatial_factor
        self.trial_size = 2 * self.row_unit

    @property
    @abstractmethod
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""

    @abstractmethod
    def latent_groups(self, frames: int) -> list[LatentGroup]:
        """The groups that so many frames encode in, in order. Their latents tile the sequence exactly.

        Raises:
            ValueError: when the encoder cannot encode that many frames, or would drop some; the message says what fits.
        """

    def groups(self, length: int) -> Sequence[Group]:
        return self.latent_groups(length)

    def own_encode(self, video: Tensor) -> Tensor:
        """The moments of the VAE's own ``encode``, of which this encoder is the recurrence."""
        return unpatched(self.vae, "encode")(video, return_dict=False)[0].parameters

    def own(self, x: Tensor) -> Tensor:
        return self.own_encode(x)

    def latent_count(self, frames: int) -> int:
        """Number of latents that so many frames encode to."""
        return self.latent_groups(frames)[-1].latents.stop

    def encode(self, video: Tensor) -> Tensor:
        """The moments of [batch, channels, frames, height, width] by the recurrence; equals the VAE's own encode."""
        return self.run(video)


def check_frames(frames: int) -> None:
    """Raises:
    ValueError: there are none.
    """
    if frames < 1:
        raise ValueError(f"At least one frame is needed, got {frames}.")


def refused(frames: int, below: int, above: int, why: str) -> ValueError:
    """The error for a number of frames between two that fit."""
    return ValueError(f"{frames} frames do not fit the encoder's groups: {why}. Pass {below} or {above} frames.")


__all__ = [
    "Blocks",
    "CausalEncoder",
    "Checkpoint",
    "Features",
    "LatentGroup",
    "Piece",
    "State",
    "check_frames",
    "refused",
]
