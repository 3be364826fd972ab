"""``decode``: the frames of a video as an ordinary differentiable tensor, whose backward pass is a reverse sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from chopgrad.decoders.base import CausalDecoder, FrameGroup
from chopgrad.engine import Carry, Sweep
from chopgrad.graph import not_twice, unshared_weights
from chopgrad.inputs import check_dropout, check_inputs, check_sampled, check_tangent, trained_parameters
from chopgrad.strategies import RECOMMENDED, Full, Strategy


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
        strategy: see ``chopgrad.strategies`` for costs. Default: exact, in the least memory.
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
    check_sampled(strategy)
    spans = check_inputs(decoder, latents, strategy)
    chosen = _chosen(groups, len(spans))
    first = 0 if history else chosen.start
    if isinstance(strategy, Full):
        return _in_one_graph(decoder, latents, spans, chosen, first)
    check_tangent(latents)
    check_dropout(decoder, strategy)
    parameters = trained_parameters(decoder, latents)
    call = _Call(decoder, spans, strategy, chosen, first, latents.requires_grad, parameters)
    if torch.is_grad_enabled() and (latents.requires_grad or parameters):
        return _Decode.apply(call, latents, *parameters)
    with torch.no_grad():
        return call.run(latents, keep=False)[0]


@dataclass(frozen=True)
class _Call:
    decoder: CausalDecoder
    spans: Sequence[FrameGroup]
    strategy: Strategy
    chosen: range
    first: int
    latents_need_grad: bool
    parameters: list[Any]

    def sweep(self, latents: Tensor) -> Sweep:
        plan = self.strategy.plan()
        origin = self.chosen.start
        return Sweep(
            self.decoder, self.spans, plan, latents.detach(), self.latents_need_grad, self.parameters, self.chosen,
            self.first, origin,
        )  # fmt: skip

    def frames(self, i: int) -> slice:
        """Where the frames of group i are among those that were asked for."""
        start, frames = self.spans[self.chosen.start].frames.start, self.spans[i].frames
        return slice(frames.start - start, frames.stop - start)

    def run(self, latents: Tensor, keep: bool) -> tuple[Tensor, dict[int, Carry]]:
        """The frames, and what a sweep begins with."""
        video: list[Tensor] = []
        count = self.frames(self.chosen[-1]).stop

        def see(i: int, frames: Tensor) -> None:
            if i in self.chosen:
                if not video:
                    video.append(frames.new_empty(*frames.shape[:2], count, *frames.shape[3:]))
                video[0][:, :, self.frames(i)] = frames

        with unshared_weights():
            sweep = self.sweep(latents)
            carries = sweep.decode(see, keep)
            if keep:
                sweep.host.land()  # autograd is handed the states, and hooks of the user's may read what it saves
        return video[0], carries


class _Decode(torch.autograd.Function):
    """Forward: decode without graphs and keep the states that the strategy wants. Backward: the engine's sweep."""

    @staticmethod
    def forward(ctx: Any, call: _Call, latents: Tensor, *parameters: Tensor) -> Tensor:
        video, carries = call.run(latents, keep=True)
        ctx.call, ctx.autocast = call, _Autocast.now(latents.device.type)
        ctx.states, tensors = _Packed.of(carries)
        # Weights are saved for the check that they have not been changed, states so that autograd frees them.
        ctx.weights = _weights(call.decoder)
        ctx.save_for_backward(latents, *tensors, *ctx.weights)
        return video

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        latents, *tensors = ctx.saved_tensors
        sources = [latents, *call.parameters]
        call.decoder.onload()
        check_dropout(call.decoder, call.strategy)
        # Weights that wait on meta are new objects whenever accelerate's hooks have brought them.
        now = _weights(call.decoder)
        if len(now) != len(ctx.weights) or any(a is not b and not b.is_meta for a, b in zip(now, ctx.weights)):
            raise RuntimeError(
                "The decoder's weights or modules were replaced between decode and its backward pass: do so afterwards."
            )
        with torch.no_grad(), ctx.autocast.again(), unshared_weights(), _requiring_grad(call.parameters):
            sweep = call.sweep(latents)
            for i in call.chosen:
                sweep.add_adjoint(i, adjoint[:, :, call.frames(i)])
            gradients = sweep.gradients(carries=ctx.states.unpack(tensors))
            found = [gradients.latents, *gradients.parameters]
            found = [None if g is None else g.to(x.dtype) for g, x in zip(found, sources, strict=True)]
        return None, *not_twice(found, adjoint, sources)


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast, to be entered again where a step is run again."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        if device_type == "meta":
            return cls(device_type, False, None)
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def again(self) -> Any:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled)


@dataclass(frozen=True)
class _Packed:
    """Carries without their tensors, which autograd keeps."""

    leaves: list[Any]
    """None in a tensor's place; of what waits on the host its parts are the leaves."""
    is_tensor: list[bool]
    spec: TreeSpec

    @classmethod
    def of(cls, carries: dict[int, Carry]) -> tuple[_Packed, list[Tensor]]:
        leaves, spec = tree_flatten(carries)
        is_tensor = [isinstance(x, Tensor) for x in leaves]
        rest = [None if t else x for x, t in zip(leaves, is_tensor, strict=True)]
        return cls(rest, is_tensor, spec), [x for x in leaves if isinstance(x, Tensor)]

    def unpack(self, tensors: Sequence[Tensor]) -> dict[int, Carry]:
        given = iter(tensors)
        leaves = [next(given) if t else x for x, t in zip(self.leaves, self.is_tensor, strict=True)]
        return tree_unflatten(leaves, self.spec)


def _weights(decoder: CausalDecoder) -> list[Tensor]:
    return list({id(x): x for x in (*decoder.parameters(), *decoder.vae.buffers())}.values())


@contextmanager
def _requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A parameter that is frozen after the forward pass still gets its gradient, as in any graph."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _chosen(groups: slice | None, count: int) -> range:
    if groups is None:
        return range(count)
    if not isinstance(groups, slice) or groups.step not in (None, 1):
        raise TypeError(f"groups must be a slice of frame groups without a step, such as slice(2, 4), got {groups!r}.")
    chosen = range(count)[groups]
    if not chosen:
        raise ValueError(f"groups={groups} has none of the {count} frame groups that these latents decode in.")
    return chosen


def _in_one_graph(
    decoder: CausalDecoder, latents: Tensor, spans: Sequence[FrameGroup], chosen: range, first: int
) -> Tensor:
    state, frames = decoder.initial_state(), []
    for i in range(chosen.stop):
        with nullcontext() if i >= first else torch.no_grad():
            x, state = decoder.step(latents[:, :, spans[i].latents], state)
        if i in chosen:
            frames.append(x)
    return torch.cat(frames, dim=2)
