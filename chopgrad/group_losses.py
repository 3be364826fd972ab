"""The loss of each frame group as it is decoded: its value, and its gradient at the frames and at everything else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from chopgrad.engine import Gradients, Sweep
from chopgrad.graph import not_twice, without_hooks
from chopgrad.target import Target, frame_parts, target_part

# In float16 a loss is scaled until the largest gradient at its frames is above the first, by no more than 2**second.
SMALLEST_ADJOINT = 2.0**-6
HIGHEST_EXPONENT = 64


class GroupLosses:
    """Shown every group in order (``see``), evaluates its loss once, and gives the sweep the adjoint of the frames.

    Args:
        target, loss_fn, context_frames: see ``chopgrad.frame_loss``.
        weights: of the groups' losses in the total; those of weight 0 are not evaluated.
        sources: the tensors that the frames depend on and whose gradient the sweep computes, latents first.
        graded: whether any gradient is wanted.
    """

    sweep: Sweep

    def __init__(
        self,
        target: Target,
        loss_fn: Callable[..., Tensor],
        weights: Sequence[float],
        sources: Sequence[Tensor],
        context_frames: int,
        graded: bool,
    ) -> None:
        self.target, self.loss_fn, self.weights = target, loss_fn, weights
        self.sources, self.context_frames, self.graded = list(sources), context_frames, graded
        self.values: list[Tensor] = []
        self.others: dict[Tensor, Tensor] = {}
        """Gradients of the leaves that a loss depends on otherwise than by the frames."""
        self._context: list[tuple[int, Tensor, Any]] = []
        self._exponent = 0
        self._reach = _Reach()
        self._current: int | None = None
        self._told = False
        self._calling = False

    def give_to(self, sweep: Sweep) -> None:
        """The sweep that decodes what is seen from now on, and is given the adjoints; also those of an earlier one that
        ran out of memory, so that no loss is called twice.
        """
        if self.values:
            sweep.take_adjoints(self.sweep)
        self.sweep = sweep

    def are_kept(self) -> bool:
        """Whether another sweep can begin with what was seen: no loss was interrupted, no adjoint is used up."""
        return not self._calling and (not self.values or self.sweep.keeps_adjoints)

    def see(self, i: int, frames: Tensor) -> None:
        if i < len(self.values):  # by an earlier sweep
            return
        self._calling = True
        self._see(i, frames)
        self._calling = False

    def _see(self, i: int, frames: Tensor) -> None:
        if not self.weights[i] and not self.context_frames:
            self.values.append(frames.new_zeros(()))
            return
        with torch.set_grad_enabled(self.graded):
            since = _sequence_number() if self.graded else 0
            part = target_part(self.target, self.sweep.groups[i].yields, frames)
            kept = self._kept_for_context(i, frames, part) if self.context_frames else None
            self._current = i
            try:
                self.values.append(self._loss(i, frames, part, since) if self.weights[i] else frames.new_zeros(()))
            finally:
                self._current = None
        if kept is not None:
            self._context.append(kept)
            while sum(x.shape[2] for _, x, _ in self._context[1:]) >= self.context_frames:
                self._context.pop(0)

    def _loss(self, i: int, frames: Tensor, part: Any, since: int) -> Tensor:
        shown = frames.detach()
        if self.sources:
            # What the loss differentiates through this node, if it does at all, is the strategy's own gradient.
            shown = _Shown.apply(shown, self._reach, lambda adjoint: self._pull(i, adjoint), *self.sources)
        before = [(j, self._shown_before(x)) for j, x, _ in self._context]
        arguments: tuple[Any, ...] = (shown.clone(), part)  # a copy, so that the loss may change it
        if self.context_frames:
            arguments += (self._pair([x for _, x in before]) if before else None,)
        try:
            loss = self.loss_fn(*arguments)
        except Exception as error:
            error.add_note(
                f"loss_fn was given {frames.shape[2]} of the frames, group {i}: frame_loss passes one frame group at a "
                "time. A loss that needs the whole clip goes through chopgrad.decode, or a patched vae.decode."
            )
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"shape {list(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                "loss_fn must return one floating-point scalar, the mean over the frames it is given; for frame group "
                f"{i} it returned {got}."
            )
        if self.graded and loss.requires_grad:
            self._exponent = self._exponent or frames.numel().bit_length() - 1
            inputs = [(i, shown), *before] if self.sources else []
            self._differentiate(loss.reshape(()), self.weights[i], inputs, since)
        # A copy: some losses (mse_loss on the CPU) return a scalar in a storage as large as the frames.
        return loss.detach().reshape(()).clone()

    def _pull(self, i: int, adjoint: Tensor) -> Gradients:
        if i != self._current:
            raise RuntimeError(
                "Frames that a loss has kept can be differentiated only while it runs: use chopgrad.decode, whose "
                "frames are an ordinary tensor."
            )
        return self.sweep.pull(i, adjoint)

    def _differentiate(self, loss: Tensor, weight: float, shown: list[tuple[int, Tensor]], since: int) -> None:
        leaves, older, outside = _other_leaves(loss, [x for _, x in shown], since, self._reach)
        if outside and not self._told:
            self._told = True
            warnings.warn(
                "The loss depends on tensors that were computed outside of it, beside the frames; each group's loss is "
                "differentiated through that computation anew. chopgrad.decode does it once.",
                stacklevel=7,
            )
        self._reach.ends_at_frames = True
        try:
            with without_hooks(leaves):
                found = self._gradients(loss, weight, [x for _, x in shown], leaves, retain=older)
        finally:
            self._reach.ends_at_frames = False
        for (j, x), adjoint in zip(shown, found, strict=False):
            if adjoint is not None:
                yields = self.sweep.groups[j].yields
                missing = yields.stop - yields.start - x.shape[2]  # of an earlier group the last frames were shown
                self.sweep.add_adjoint(j, pad(adjoint, (0, 0, 0, 0, missing, 0)))
        for leaf, gradient in zip(leaves, found[len(shown) :], strict=True):
            if gradient is not None:
                self.others[leaf] = self.others[leaf] + gradient if leaf in self.others else gradient

    def _gradients(
        self, loss: Tensor, weight: float, shown: list[Tensor], leaves: list[Tensor], retain: bool
    ) -> list[Tensor | None]:
        """``weight`` times the gradients of the loss at the frames that it was shown, and at leaves."""
        inputs, frames = [*shown, *leaves], len(shown)
        if not inputs:
            return []
        seed = torch.full_like(loss, weight)
        if not self.sweep.half:
            return list(torch.autograd.grad(loss, inputs, seed, allow_unused=True, retain_graph=retain))
        # A mean over many pixels has a gradient below the range of float16, a reward may have one beyond its end: start
        # from the number of pixels, go up while the frames get too little of it, and down while anything overflows.
        start, may_rise = self._exponent, frames > 0
        highest = 15 if loss.dtype == torch.float16 else HIGHEST_EXPONENT
        while True:
            exponent = min(self._exponent, highest)
            found = torch.autograd.grad(
                loss, inputs, torch.full_like(loss, weight * 2.0**exponent), allow_unused=True, retain_graph=True
            )
            if not all(x is None or x.isfinite().all() for x in found):
                if exponent <= -HIGHEST_EXPONENT:
                    break
                self._exponent, may_rise = exponent - 4, False
                continue
            largest = max((x.abs().max().item() for x in found[:frames] if x is not None), default=0.0)
            if not may_rise or largest >= SMALLEST_ADJOINT:
                break
            if exponent == highest:  # nothing but zeros says nothing about the next group
                self._exponent = self._exponent if largest else start
                break
            self._exponent = exponent + 8
        return [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) / 2**exponent for x in found]

    def _kept_for_context(self, i: int, frames: Tensor, part: Any) -> tuple[int, Tensor, Any]:
        # A clone, so that the whole group's frames are not kept alive, and what the loss changes is not seen.
        last = slice(max(0, frames.shape[2] - self.context_frames), None)
        of_part = tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, frame_parts(part, frames.shape[2], last)
        )
        return i, frames.detach()[:, :, last].clone(), of_part

    def _shown_before(self, frames: Tensor) -> Tensor:
        return _Shown.apply(frames, self._reach, None, *self.sources) if self.sources else frames

    def _pair(self, frames: list[Tensor]) -> tuple[Tensor, Any]:
        """The context: frames and target frames before this group."""
        last = slice(-self.context_frames, None)
        parts = [part for _, _, part in self._context]
        counts = [x.shape[2] for x in frames]

        def join(*parts: Any) -> Any:
            framed = all(
                isinstance(x, Tensor) and x.ndim > 2 and x.shape[2] == n for x, n in zip(parts, counts, strict=True)
            )
            return torch.cat(parts, dim=2)[:, :, last] if framed else parts[-1]

        return torch.cat(frames, dim=2)[:, :, last], tree_map(join, *parts)


@dataclass
class _Reach:
    """How far gradients go that reach the frames."""

    ends_at_frames: bool = False
    """While the adjoint of the frames is asked for: a leaf may be reached beside the frames, and by them too."""


class _Shown(torch.autograd.Function):
    """A group's frames as a function of latents and parameters: differentiated only if the loss itself asks for it."""

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, reach: _Reach, pull: Callable[[Tensor], Gradients] | None, *sources: Tensor
    ) -> Tensor:
        ctx.reach, ctx.pull, ctx.sources = reach, pull, sources
        return frames.view_as(frames)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.reach.ends_at_frames:
            return None, None, None, *(None for _ in ctx.sources)
        if ctx.pull is None:
            raise RuntimeError(
                "torch.autograd.grad inside a loss with context_frames would miss what reaches a parameter by the "
                "context: use chopgrad.decode, whose frames are an ordinary tensor."
            )
        with torch.no_grad():
            gradients = ctx.pull(adjoint)
            found = [gradients.source, *gradients.parameters][-len(ctx.sources) :]
            found = [None if g is None else g.to(x.dtype) for g, x in zip(found, ctx.sources, strict=True)]
        return None, None, None, *not_twice(found, adjoint, ctx.sources)


def _sequence_number() -> int:
    """PyTorch numbers the nodes of graphs in the order in which a thread makes them."""
    node: Any = torch.ones((), requires_grad=True).clone().grad_fn
    return node._sequence_nr()


def _other_leaves(loss: Tensor, shown: list[Tensor], since: int, reach: _Reach) -> tuple[list[Tensor], bool, bool]:
    """The leaves of the loss's graph that are not reached by the frames.

    Also whether there are nodes older than ``since``, of something that was computed before the loss was called, and
    whether some leaves are reached only through these. (What a loss differentiates itself makes nodes in another
    thread, with numbers of their own, but these lead to leaves that younger nodes lead to as well.)

    Raises:
        ValueError: the loss uses frames of an earlier group.
    """
    stops = {x.grad_fn for x in shown}
    leaves: dict[Tensor, bool] = {}
    known: dict[Any, bool] = {}
    waiting: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while waiting:
        node, old = waiting.pop()
        if node is None or node in stops or (node in known and known[node] <= old):
            continue
        known[node] = old
        if hasattr(node, "variable"):
            leaves[node.variable] = leaves.get(node.variable, True) and old
            continue
        if getattr(node, "reach", None) is reach:
            raise ValueError(
                "The loss uses frames of an earlier group that it has kept, and their gradient would be lost: use "
                "context_frames, keep frames.detach(), or use chopgrad.decode."
            )
        old = old or node._sequence_nr() < since
        waiting += [(following, old) for following, _ in node.next_functions]
    return list(leaves), any(known[node] for node in known if not hasattr(node, "variable")), any(leaves.values())
