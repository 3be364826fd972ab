"""``frame_loss``: a pixel loss on decoded frames as an ordinary scalar, under any gradient strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from chopgrad.adaptive import Adaptive
from chopgrad.decoders import CausalDecoder
from chopgrad.decoders.base import FrameGroup
from chopgrad.engine import Gradients, Sweep
from chopgrad.strategies import Chop, Sampled, Strategy

_Dropout = torch.nn.modules.dropout._DropoutNd
LossFn = Callable[..., Tensor]
Target = Any
"""A tensor or array [batch, 3, frames, H, W] in [-1, 1] (memory-mapped is fine), or ``slice of frames -> Tensor``."""


def frame_loss(
    decoder: CausalDecoder,
    latents: Tensor,
    target: Target,
    loss_fn: LossFn,
    strategy: Strategy | Adaptive = Chop(distance=1),  # noqa: B008  (frozen)
    *,
    context_frames: int = 0,
    loss_scale: float = 1.0,
) -> Tensor:
    """Pixel-wise loss of the decoded video, differentiable with memory that the strategy sets.

    ``sum_i (n_i / n) loss_fn(frames_i, target_i)`` over frame groups i of n_i frames: equal to ``loss_fn`` on the
    whole video for every loss that is a mean of per-frame terms. The value does not depend on the strategy; only the
    gradient does (arXiv 2603.17812, Sec. 3.2). Gradients are computed here, group by group, while the video is being
    decoded; ``backward`` only hands them on, so it may be called in any composition, but not differentiated again.

    Args:
        decoder: from ``chopgrad.decoder_for(vae)``.
        latents: [batch, channels, latent_frames, h, w] in the VAE's own space (see ``decoder.denormalize``).
        target: [batch, 3, frames, H, W] in [-1, 1] on any device, or a NumPy array or memory map of that shape, or a
            callable that takes the slice of frames of a group and returns that part; moved to the latents' device
            group by group.
        loss_fn: ``loss_fn(frames, target_frames) -> scalar``, the mean over the frames it is given.
        strategy: ``Full()``, ``Chop(distance, block, ...)`` or ``Exact()``: see ``chopgrad.strategies`` for costs; or
            ``Adaptive(tolerance)``, or ``Sampled(count, strategy)``, whose value is an estimate too.
        context_frames: with k > 0 the loss is called as ``loss_fn(frames, target_frames, context)`` where context is
            None for the first group and else the pair (frames, target frames) of the k frames before the group (fewer
            at the start). Context frames belong to the carried state: their gradient follows the same truncation.
        loss_scale: scales the sweeps' adjoints and is divided out at the end. Pass ``scaler.get_scale()`` when the
            decoder runs in float16, whose small gradients would vanish otherwise.

    Returns:
        Scalar tensor, float32 (float64 if the losses are).

    Raises:
        ValueError, TypeError: for shapes, devices, dtypes or settings that do not fit; the message says what to pass.
        FloatingPointError: the loss of a group is not finite (the message says which).
    """
    groups = _check(decoder, latents, target, strategy, context_frames, loss_scale)
    count = groups[-1].frames.stop
    weights = [group.frame_count / count for group in groups]
    if isinstance(strategy, Sampled):
        weights = strategy.weights(weights)
    seeds = [w * loss_scale for w in weights]
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    wanted = torch.is_grad_enabled() and (latents.requires_grad or bool(parameters))

    def losses(scored: Collection[int]) -> GroupLosses:
        return GroupLosses(groups, target, loss_fn, context_frames, latents.device, scored)

    with torch.no_grad(), _no_autocast_cache():
        z = latents.detach()
        chosen = strategy
        if isinstance(chosen, Adaptive):
            probe = (decoder, groups, lambda i: losses([i]), z, seeds, loss_scale)
            chosen = chosen.choose(*probe) if wanted else chosen.at(0)
        scored = [i for i, weight in enumerate(weights) if weight]
        sweep = Sweep(decoder, groups, losses(scored), chosen.plan(), z, latents.requires_grad, parameters, seeds)
        if not wanted:
            return _total(sweep.values(), weights)
        gradients = sweep.gradients()
    total = _total(gradients.losses, weights)
    if isinstance(strategy, Adaptive) and gradients.latents is not None:
        strategy.learn(gradients.latents, groups, loss_scale)
    return _FrameLoss.apply(total, loss_scale, gradients, latents, *parameters)


def framewise(loss_fn: LossFn) -> LossFn:
    """``loss_fn`` evaluated frame by frame and recomputed in the backward pass: the graph of one frame at a time.

    For perceptual losses, whose own activations would otherwise be the peak. ``loss_fn`` must be a mean of per-frame
    terms; value and gradient are then the same.

    Cost: one more evaluation of ``loss_fn``.
    """

    def evaluate(frames: Tensor, target: Tensor) -> Tensor:
        parts = zip(frames.split(1, dim=2), target.split(1, dim=2), strict=True)
        return torch.stack([checkpoint(loss_fn, x, y, use_reentrant=False) for x, y in parts]).mean()

    return evaluate


class GroupLosses:
    """The loss of one group against its part of the target, and the context that the next group sees."""

    def __init__(
        self,
        groups: list[FrameGroup],
        target: Target,
        loss_fn: LossFn,
        context_frames: int,
        device: torch.device,
        scored: Collection[int],
    ) -> None:
        self.groups, self.target, self.loss_fn, self.device = groups, target, loss_fn, device
        self.context_frames, self.scored = context_frames, frozenset(scored)

    def __call__(self, i: int, frames: Tensor, context: Any) -> tuple[Tensor, Any]:
        if i not in self.scored and not self.context_frames:
            return frames.new_zeros(()), None
        part = self._target(self.groups[i].frames, frames)
        loss: Any = frames.new_zeros(())
        if i in self.scored:
            loss = self.loss_fn(frames, part, context) if self.context_frames else self.loss_fn(frames, part)
        if self.context_frames:
            pair: tuple[Tensor, ...] = (frames, part)
            if context is not None:
                pair = tuple(torch.cat([old, new], dim=2) for old, new in zip(context, pair, strict=True))
            # A clone, so that the context does not keep the whole group's frames alive.
            context = tuple(x[:, :, -self.context_frames :].clone() for x in pair)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"shape {list(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                "loss_fn must return one floating-point scalar, the mean over the frames it is given; for frame group "
                f"{i} it returned {got}."
            )
        # A copy: some losses (mse_loss on the CPU) return a scalar in a storage as large as the frames.
        return loss.reshape(()).clone(), context

    def _target(self, frames: slice, like: Tensor) -> Tensor:
        part = self.target(frames) if callable(self.target) else self.target[:, :, frames]
        part = torch.as_tensor(part)
        if part.shape != like.shape:
            raise ValueError(
                f"target for frames {frames.start} to {frames.stop - 1} has shape {list(part.shape)}, but these "
                f"latents decode to {list(like.shape)}."
            )
        _check_floating(part.dtype)
        return part.detach().to(self.device, non_blocking=True)


class _FrameLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, loss_scale: float, gradients: Gradients, latents: Tensor, *parameters: Tensor):
        ctx.loss_scale = loss_scale
        ctx.save_for_backward(gradients.latents, *gradients.parameters)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        factor = grad_output / ctx.loss_scale
        return None, None, None, *(None if g is None else g * factor.to(g.dtype) for g in ctx.saved_tensors)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    # Autocast's cache of cast weights would tie the graphs of all groups together, and hand weights that were cast
    # without a graph to the groups that need one.
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)


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
    return (values * torch.tensor(weights[: len(losses)], dtype=values.dtype, device=values.device)).sum()


def _check(
    decoder: CausalDecoder,
    latents: Tensor,
    target: Target,
    strategy: Strategy | Adaptive,
    context_frames: int,
    loss_scale: float,
) -> list[FrameGroup]:
    if not isinstance(decoder, CausalDecoder):
        raise TypeError(f"decoder must come from chopgrad.decoder_for(vae), got {type(decoder).__name__}.")
    if not isinstance(strategy, Strategy | Adaptive):
        raise TypeError(
            f"strategy must be Full(), Chop(distance=...), Exact(), Sampled(...) or Adaptive(...), got {strategy!r}."
        )
    if isinstance(context_frames, bool) or not isinstance(context_frames, int) or context_frames < 0:
        raise ValueError(f"context_frames must be an int of at least 0, got {context_frames!r}.")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale must be positive, got {loss_scale}.")
    if not isinstance(latents, Tensor) or latents.ndim != 5:
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor [batch, channels, latent_frames, h, w], got {got}.")
    if latents.shape[1] != decoder.latent_channels:
        raise ValueError(
            f"latents have {latents.shape[1]} channels, but this decoder takes {decoder.latent_channels}: pass them as "
            f"[batch, {decoder.latent_channels}, latent_frames, h, w]; got {list(latents.shape)}."
        )
    if not latents.is_floating_point():
        raise TypeError(f"latents must be floating point, got {latents.dtype}.")
    weight = next(iter(decoder.parameters()))
    if latents.device != weight.device:
        raise ValueError(f"latents are on {latents.device}, but the decoder is on {weight.device}: move one of them.")
    if latents.dtype != weight.dtype and not torch.is_autocast_enabled(latents.device.type):
        raise TypeError(
            f"latents are {latents.dtype}, but the decoder is {weight.dtype}: cast one of them, or use torch.autocast."
        )
    plan = strategy.at(0).plan() if isinstance(strategy, Adaptive) else strategy.plan()
    recomputes = plan.recompute or isinstance(strategy, Adaptive) or decoder.checkpoint is not None
    if recomputes and any(isinstance(m, _Dropout) and m.training and m.p for m in decoder.vae.modules()):
        raise ValueError(f"{strategy} runs steps twice, and active dropout would differ between them: call vae.eval().")
    groups = decoder.frame_groups(latents.shape[2])
    if not callable(target):
        _check_target(target, latents, groups)
    return groups


def _check_target(target: Target, latents: Tensor, groups: list[FrameGroup]) -> None:
    shape = getattr(target, "shape", None)
    if shape is None or len(shape) != 5:
        got = type(target).__name__ if shape is None else list(shape)
        raise ValueError(f"target must be [batch, 3, frames, H, W] or a callable of the slice of frames, got {got}.")
    frames = groups[-1].frames.stop
    if shape[2] != frames:
        raise ValueError(f"target has {shape[2]} frames, but {latents.shape[2]} latent frames decode to {frames}.")
    if shape[0] != latents.shape[0]:
        raise ValueError(f"target has batch {shape[0]}, but the latents have batch {latents.shape[0]}.")
    if isinstance(target, Tensor) or target.dtype.kind != "f":
        _check_floating(target.dtype)


def _check_floating(dtype: Any) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"target is {dtype}; pass floating point in [-1, 1]. From 8-bit frames: target.float() / 127.5 - 1."
        )
