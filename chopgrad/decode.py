"""``decode``: the frames of a video as an ordinary differentiable tensor, whose backward pass is a reverse sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from chopgrad.decoders.base import CausalDecoder
from chopgrad.strategies import RECOMMENDED, Strategy
from chopgrad.whole import run_whole


@torch.compiler.disable
def decode(
    decoder: CausalDecoder,
    latents: Tensor,
    strategy: Strategy = RECOMMENDED,
    *,
    groups: slice | None = None,
    history: bool = True,
) -> Tensor:
    """Decode latents to frames that any loss may use; ``backward`` walks the decoder as the strategy says.

    The frames are those of ``vae.decode(latents).sample``, and with ``Full()`` or ``Exact(...)`` so is every gradient:
    of the latents and of each decoder parameter that requires one, whatever the loss does with the frames (a reward
    model or video encoder that sees the whole clip, optical flow, a discriminator). ``Chop(D)`` truncates it: the total
    derivative dL/dx_i by the frames of group i takes the place of the gradient of L_i in arXiv 2603.17812, Sec. 3.2,
    and reaches the latents i, i-1, ..., i-D.

    An ordinary node of autograd: it composes, accumulates, may be gone through more than once with
    ``retain_graph=True``, and what waits for the backward pass is freed when autograd frees it. In-place changes of
    latents or weights in between are an error. Only ``Full()``, which is ordinary back-propagation through one graph,
    can be differentiated twice.

    Args:
        decoder: from ``chopgrad.decoder_for(vae)``.
        latents: [batch, channels, latent_frames, h, w] in the VAE's own space (see ``decoder.denormalize``).
        strategy: see ``chopgrad.strategies`` for costs. Default: exact, as fast as the memory that is free allows.
        groups: only the frames of these frame groups (a slice of ``decoder.frame_groups(latent_frames)``); later ones
            are not decoded. Blocks of a ``Chop`` begin at its first.
        history: whether groups before ``groups`` get a gradient. If not they are decoded without graphs, once.

    Returns:
        [batch, 3, frames, H, W], in [-1, 1] where the VAE clamps.

    Raises:
        ValueError, TypeError: for shapes, devices, dtypes or settings that do not fit; the message says what to pass.

    Cost: that of ``frame_loss`` with the same strategy, in which ``Exact`` runs every group twice forward and once back
    (with ``pieces`` three times and once); a ``Chop`` runs once forward more, because it streams again in the backward
    pass and keeps no state but the first that it needs. Frames and their gradient are kept whole: 0.19 GB each for 81
    frames of 480x832 in bfloat16.
    """
    if not isinstance(decoder, CausalDecoder):
        raise TypeError(f"decoder must come from chopgrad.decoder_for(vae), got {type(decoder).__name__}.")
    return run_whole(decoder, latents, strategy, groups, history)
