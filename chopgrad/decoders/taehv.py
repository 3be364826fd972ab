"""Tiny video decoders (TAEHV and its kin): one latent per group, and one frame of memory per block.

``TAEHV`` of github.com/madebyollin/taehv, with the weights for HunyuanVideo, Wan, CogVideoX, Mochi or LTX, and copies
of the class elsewhere. It is recognised by its structure, never by name, and proven by one tiny decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chopgrad.decoders.base import Blocks, CausalDecoder, Checkpoint, Features, FrameGroup, State, check_latent_frames
from chopgrad.recurrence import unpatched


class TAEHVDecoder(CausalDecoder):
    """The recurrence of ``decode_video``.

    Frames are those of ``decode_video``, in [0, 1], in the layout of this library: [batch, 3, frames, H, W], of latents
    [batch, channels, latent_frames, h, w]. Latents are taken as the diffusion model sees them, so that ``denormalize``
    is the identity, and so is ``normalize``. Every latent becomes ``t_upscale`` frames, of which the first keeps the
    last only. With CogVideoX's weights the first of an even number of latents keeps all: groups are then of two
    latents, and a first group of one tells an odd number.

    A piece is a block with a memory, or all layers between two of them, which see one frame. The slice of the state of
    a memory block is the last frame that entered it.

    Args:
        vae: the model.
        clamp: keep the clamp to [0, 1].
        checkpoint: see ``CausalDecoder``. ``"frame"`` does nothing here: there are no norms.
    """

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, clamp, checkpoint)
        if getattr(vae, "is_h3", False):
            raise ValueError(
                "TAEH3 drops frames every five latents and at the end, which chopgrad does not know: use its "
                "decode_video, or write a decoder for it (a subclass of chopgrad.CausalDecoder)."
            )

    @property
    def latent_channels(self) -> int:
        return next(m.in_channels for m in self.vae.decoder.modules() if isinstance(m, nn.Conv2d))

    @property
    def _factor(self) -> int:
        """Frames per latent."""
        return prod(_growth(layer) for layer in self.vae.decoder)

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        size = 2 if getattr(self.vae, "is_cogvideox", False) else 1
        first = latent_frames % size or size
        trimmed = self.vae.frames_to_trim if first == 1 else 0
        latents = [0, *range(first, latent_frames + 1, size)]
        frames = [max(self._factor * i - trimmed, 0) for i in latents]
        return [FrameGroup(slice(*latents[i : i + 2]), slice(*frames[i : i + 2])) for i in range(len(latents) - 1)]

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        blocks: Blocks = [[[self._entry]]]
        for layers in _runs(self.vae.decoder):
            if _has_memory(layers[0]):
                blocks[-1].append([partial(_remember, layers[0])])
            else:  # the end of a level
                blocks[-1].append([partial(_apply, layers)])
                blocks.append([])
        return [*(block for block in blocks if block), [[self._head]]]

    def _entry(self, features: Features, nothing: None) -> tuple[Features, None]:
        """[batch, channels, time, h, w] -> [batch, time, channels, h, w], the layout of the model."""
        return (features[0].transpose(1, 2),), nothing

    def _head(self, features: Features, seen: Any) -> tuple[Features, Any]:
        (x,) = features
        if seen is None and x.shape[1] == self._factor:
            x = x[:, self.vae.frames_to_trim :]
        patch = getattr(self.vae, "patch_size", 1)
        x = F.pixel_shuffle(x, patch) if patch > 1 else x
        return (self.clamped(x.transpose(1, 2)),), "seen"

    def clamped(self, frames: Tensor) -> Tensor:
        return frames.clamp(0, 1) if self.clamp else frames

    def own_decode(self, latents: Tensor) -> Tensor:
        frames = unpatched(self.vae, "decode_video")(latents.transpose(1, 2), show_progress_bar=False)
        return frames.transpose(1, 2)

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents

    def normalize(self, latents: Tensor) -> Tensor:
        return latents


def is_taehv(vae: Any) -> bool:
    """Whether it has the structure of TAEHV."""
    decoder: Any = getattr(vae, "decoder", None)
    if not isinstance(decoder, nn.Sequential) or not all(hasattr(vae, x) for x in ("decode_video", "frames_to_trim")):
        return False
    return any(_has_memory(layer) for layer in decoder)


def _has_memory(layer: Any) -> bool:
    """Whether it is called as ``layer(x, past)``."""
    takes = signature(getattr(layer, "_orig_mod", layer).forward).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in takes) == 2


def _growth(layer: Any) -> int:
    """How many frames it makes of one."""
    stride = getattr(layer, "stride", 1)
    return stride if isinstance(stride, int) else 1


def _runs(decoder: Any) -> Iterator[list[Any]]:
    """Each layer with a memory alone, and all layers between them."""
    run: list[Any] = []
    for layer in decoder:
        if _has_memory(layer):
            if run:
                yield run
            yield [layer]
            run = []
        else:
            run.append(layer)
    if run:
        yield run


def _apply(layers: list[Any], features: Features, nothing: None) -> tuple[Features, None]:
    x = features[0].flatten(0, 1)
    if getattr(layers[0], "inplace", False):
        x = x.clone()  # what enters a piece is kept
    for layer in layers:
        x = layer(x)
    return (x.unflatten(0, (features[0].shape[0], -1)),), nothing


def _remember(block: Any, features: Features, before: Tensor | None) -> tuple[Features, Tensor]:
    """A block with a memory of one frame, which is zero at the start."""
    (x,) = features
    first = torch.zeros_like(x[:, :1]) if before is None else before
    past = torch.cat([first, x[:, :-1]], dim=1)
    y = block(x.flatten(0, 1), past.flatten(0, 1)).unflatten(0, x.shape[:2])
    return (y,), x[:, -1:].clone()
