"""Every pairwise gradient dL_i/dz_j of a decoded video: from them the gradient of any truncation follows by masking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chopgrad import CausalDecoder


def pairwise_gradients(
    decoder: CausalDecoder, latents: Tensor, target: Tensor, losses: list[Callable[[Tensor, Tensor], Tensor]]
) -> list[Tensor]:
    """For each loss the tensor [i, j, batch, channels, latents per group, h, w] of dL_i/dz_j, zero for j > i.

    L_i is the loss of frame group i with its share of the frames, so the sum over i is the gradient of the whole
    video's loss (arXiv 2603.17812, Sec. 3.2). A first group with more latents than the others (CogVideoX with an odd
    number) leaves the unused part zero.

    Cost: one decode with its whole graph in memory, and T backward passes per loss (through T/2 groups on average).
    """
    groups = decoder.frame_groups(latents.shape[2])
    zs = [latents[:, :, g.latents].detach().requires_grad_() for g in groups]
    frames, state = [], decoder.initial_state()
    for z in zs:
        x, state = decoder.step(z, state)
        frames.append(x)
    total, longest = groups[-1].frames.stop, max(z.shape[2] for z in zs)
    results = []
    for loss_fn in losses:
        pairs = latents.new_zeros(len(zs), len(zs), *latents.shape[:2], longest, *latents.shape[3:])
        for i, (group, x) in enumerate(zip(groups, frames, strict=True)):
            leaf = x.detach().requires_grad_()
            part = loss_fn(leaf, target[:, :, group.frames]) * (group.frame_count / total)
            (adjoint,) = torch.autograd.grad(part, leaf)
            for j, gradient in enumerate(torch.autograd.grad(x, zs[: i + 1], adjoint, retain_graph=True)):
                pairs[i, j, :, :, : gradient.shape[2]] = gradient
        results.append(pairs)
    return results


def truncated(pairs: Tensor, distance: int, block: int = 1, weights: Sequence[float] | None = None) -> Tensor:
    """[j, ...]: the gradient of ``Chop(distance, block)`` at each group's latents, by its definition.

    ``weights`` of the losses: those of one draw of ``chopgrad.Sampled``. All is done on the device of ``pairs``.
    """
    place = torch.arange(len(pairs), device=pairs.device)
    i, j = place[:, None], place[None, :]
    kept = (i >= j) & (i <= (j // block + 1) * block - 1 + distance)
    factors = kept.to(pairs) if weights is None else kept * pairs.new_tensor(weights)[:, None]
    return torch.einsum("ij,ij...->j...", factors, pairs)
