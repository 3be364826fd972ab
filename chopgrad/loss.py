"""``frame_loss``: a loss that sees one frame group at a time, as an ordinary scalar, under any gradient strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from chopgrad.automatic import with_room
from chopgrad.decoders.base import CausalDecoder
from chopgrad.engine import Gradients, Sweep
from chopgrad.graph import not_twice, unshared_weights
from chopgrad.group_losses import GroupLosses
from chopgrad.inputs import check_dropout, check_inputs, check_tangent, trained_parameters
from chopgrad.strategies import RECOMMENDED, Sampled, Strategy
from chopgrad.target import Target, check_target, frame_parts

LossFn = Callable[..., Tensor]


@torch.compiler.disable
def frame_loss(
    decoder: CausalDecoder,
    latents: Tensor,
    target: Target,
    loss_fn: LossFn,
    strategy: Strategy = RECOMMENDED,
    *,
    context_frames: int = 0,
) -> Tensor:
    """Pixel-wise loss of the decoded video, differentiable with memory that the strategy sets.

    ``sum_i (n_i / n) loss_fn(frames_i, target_i)`` over frame groups i of n_i frames: equal to ``loss_fn`` on the
    whole video for every loss that is a mean of per-frame terms. For a loss that sees the whole video use
    ``chopgrad.decode``, whose streaming form this is: frames, target and the loss's own graph exist for one group at a
    time. The value does not depend on the strategy; only the gradient does (arXiv 2603.17812, Sec. 3.2). Gradients are
    computed here, group by group, while the video is being decoded; ``backward`` only hands them on, so it may be
    called in any composition, but not differentiated again.

    Args:
        decoder: from ``chopgrad.decoder_for(vae)``.
        latents: [batch, channels, latent_frames, h, w] in the VAE's own space (see ``decoder.denormalize``).
        target: what the loss compares with: a tensor, array or memory map whose third axis is the frames (a video
            [batch, 3, frames, H, W] in [-1, 1], a mask, weights), a pytree of them, None, or a function of the slice of
            frames of a group that returns that part in any form. ``loss_fn`` gets a copy of its part on the latents'
            device, in the frames' dtype where floating point. A loss that wants to know which frames it is given:
            ``target=lambda at: (video[:, :, at], at)``.
        loss_fn: ``loss_fn(frames, target_frames) -> scalar``, the mean over the frames it is given. Called once for
            each group. Other tensors in it that require grad (a discriminator, learned weights, the target) get their
            gradient. It may call ``torch.autograd.grad``; what it differentiates is this group's loss.
        strategy: ``Full()``, ``Chop(distance, block, ...)`` or ``Exact()``: see ``chopgrad.strategies`` for costs; or
            ``Sampled(count, strategy)``, whose value is an estimate too.
        context_frames: with k > 0 the loss is called as ``loss_fn(frames, target_frames, context)`` where context is
            None for the first group and else the pair (frames, target frames) of the k frames before the group (fewer
            at the start). Their gradient follows the same truncation as the state.

    Returns:
        Scalar tensor, float32 (float64 if the losses are).

    Raises:
        ValueError, TypeError: for shapes, devices, dtypes or settings that do not fit; the message says what to pass.
        FloatingPointError: the loss of a group is not finite (the message says which).
    """
    if isinstance(context_frames, bool) or not isinstance(context_frames, int) or context_frames < 0:
        raise ValueError(f"context_frames must be an int of at least 0, got {context_frames!r}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function; frame_loss(decoder, latents, target, loss_fn) got {loss_fn!r}.")
    if not isinstance(decoder, CausalDecoder):
        raise TypeError(f"decoder must come from chopgrad.decoder_for(vae), got {type(decoder).__name__}.")
    check_inputs(decoder, latents, strategy)
    groups = decoder.frame_groups(latents.shape[2])
    check_tangent(latents)
    if strategy.plan().recompute or decoder.checkpoint not in (None, "auto"):
        check_dropout(decoder, strategy)
    check_target(target, latents.shape[0], latents.shape[2], groups)
    count = groups[-1].frames.stop
    weights = [group.frame_count / count for group in groups]
    if isinstance(strategy, Sampled):
        weights = strategy.weights(weights)
    parameters = trained_parameters(decoder, latents, depth=4)
    graded = torch.is_grad_enabled()
    swept = graded and (latents.requires_grad or bool(parameters))
    sources = [x for x in (latents, *parameters) if x.requires_grad] if swept else []

    losses = GroupLosses(target, loss_fn, weights, sources, context_frames, graded)

    def run(strategy: Strategy) -> Gradients:
        scored = [i for i, weight in enumerate(weights) if weight]
        with torch.no_grad(), unshared_weights():
            sweep = Sweep(decoder, groups, strategy.plan(), latents.detach(), latents.requires_grad, parameters, scored)
            losses.give_to(sweep)
            if swept:
                return sweep.gradients(losses.see)
            sweep.decode(losses.see)
            return Gradients(None, [None] * len(parameters))

    gradients = with_room(strategy, decoder, latents, groups, True, run, losses.are_kept)
    total = _total(losses.values, weights)
    found = [gradients.source, *gradients.parameters, *losses.others.values()]
    if all(x is None for x in found):
        return total
    return _FrameLoss.apply(total, found, latents, *parameters, *losses.others)


def framewise(loss_fn: LossFn) -> LossFn:
    """``loss_fn`` evaluated frame by frame and recomputed in the backward pass: the graph of one frame at a time.

    For perceptual losses, whose own activations would otherwise be the peak. ``loss_fn`` must be a mean of per-frame
    terms; value and gradient are then the same.

    Cost: one more evaluation of ``loss_fn``.
    """

    def evaluate(frames: Tensor, target: Any) -> Tensor:
        count = frames.shape[2]
        parts = [(frames[:, :, i : i + 1], frame_parts(target, count, slice(i, i + 1))) for i in range(count)]
        return torch.stack([checkpoint(loss_fn, x, y, use_reentrant=False) for x, y in parts]).mean()

    return evaluate


class _FrameLoss(torch.autograd.Function):
    """The value, with the gradients that were computed beside it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.inputs = inputs
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In float16 the factor may be too large for it (a GradScaler's), or the gradient too small without it.
        with torch.no_grad():
            found = [
                None if g is None else (g.to(torch.promote_types(g.dtype, torch.float32)) * grad_output).to(x.dtype)
                for g, x in zip(ctx.saved_tensors, ctx.inputs, strict=True)
            ]
        return None, None, *not_twice(found, grad_output, ctx.inputs)


def _total(losses: list[Tensor], weights: list[float]) -> Tensor:
    values = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in losses])
    fake = values.is_meta or isinstance(values, FakeTensor)  # memory is being predicted: there are no values
    bad = [] if fake else (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"The loss of frame group {bad[0]} is {values[bad[0]].item()}"
            + (f" (and of {len(bad) - 1} more groups)" if len(bad) > 1 else "")
            + ". Check latents and target for NaN or infinity, and the loss for overflow in this dtype."
        )
    # Groups after the last one that counts were not decoded.
    return torch.stack([x * weight for x, weight in zip(values, weights)]).sum()
