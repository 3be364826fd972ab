"""``encode``: a video's moments as an ordinary differentiable tensor, whose backward pass is a reverse sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from chopgrad.encoders.base import CausalEncoder
from chopgrad.strategies import RECOMMENDED, Strategy
from chopgrad.whole import run_whole


@torch.compiler.disable
def encode(
    encoder: CausalEncoder,
    video: Tensor,
    strategy: Strategy = RECOMMENDED,
    *,
    groups: slice | None = None,
    history: bool = True,
) -> Tensor:
    """Encode a video to moments that any loss may use; ``backward`` walks the encoder as the strategy says.

    The moments are those of ``vae.encode(video).latent_dist.parameters``, and with ``Full()`` or ``Exact(...)`` so is
    every gradient: of the video and of each encoder parameter that requires one, whatever is made of the moments (a
    sample that is decoded again, a KL term, a loss on latents). ``Chop(D)`` truncates it: the total derivative by the
    moments of group i reaches the frames of groups i, i-1, ..., i-D.

    An ordinary node of autograd, like ``chopgrad.decode``: it composes, accumulates, may be gone through more than once
    with ``retain_graph=True``, and what waits for the backward pass is freed when autograd frees it. In-place changes
    of the video or weights in between are an error. Only ``Full()``, which is ordinary back-propagation through one
    graph, can be differentiated twice.

    Args:
        encoder: from ``chopgrad.encoder_for(vae)``.
        video: [batch, 3, frames, height, width] in [-1, 1]. It needs no gradient where only the encoder is
            trained.
        strategy: see ``chopgrad.strategies`` for costs. Default: exact, as fast as the memory that is free allows.
        groups: only the moments of these groups (a slice of ``encoder.latent_groups(frames)``); later ones are not
            encoded. Blocks of a ``Chop`` begin at its first.
        history: whether groups before ``groups`` get a gradient. If not they are encoded without graphs, once.

    Returns:
        [batch, 2 * latent channels, latents, h, w]: means and log-variances, in the VAE's own space (see
        ``decoder.normalize``). diffusers' ``DiagonalGaussianDistribution(moments)`` samples and has the KL divergence.

    Raises:
        ValueError, TypeError: for shapes, numbers of frames, devices, dtypes or settings that do not fit; the message
            says what to pass.

    Cost: that of ``chopgrad.decode`` with the same strategy, in passes of the encoder. The video, and its gradient
    where it is wanted, are kept whole.
    """
    if not isinstance(encoder, CausalEncoder):
        raise TypeError(f"encoder must come from chopgrad.encoder_for(vae), got {type(encoder).__name__}.")
    return run_whole(encoder, video, strategy, groups, history)
