"""One piece of a group between detached leaves: its graph, and its vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from chopgrad.offload import dense
from chopgrad.recurrence import Features, Piece

Adjoints = Sequence[Tensor | None]


@dataclass
class Graph:
    """The graph of one piece, from the leaves ``features`` and ``carry_in`` to ``outputs`` and ``carry_out``."""

    features: list[Tensor]
    carry_in: list[Any]
    outputs: Features
    carry_out: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, piece: Piece, features: Features, carry: Any, tracked: bool) -> Graph:
        """Run a piece.

        Args:
            tracked: whether the gradient of the features is wanted.
        """
        leaves, spec = tree_flatten(carry)
        carry_in = [_leaf(x) for x in leaves]
        inputs = [_leaf(x) if tracked else x.detach() for x in features]
        with torch.enable_grad():
            outputs, after = piece(tuple(inputs), tree_unflatten(carry_in, spec))
        carry_out, spec = tree_flatten(after)
        return cls(inputs, carry_in, outputs, carry_out, spec)

    def detached_carry(self) -> Any:
        """What leaves for the next group, without this graph."""
        return tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in self.carry_out], self.spec)

    def pull(
        self,
        of_outputs: Adjoints,
        of_carry_out: Adjoints,
        *,
        features: bool,
        parameters: Sequence[Tensor],
        carry: bool,
        retain: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Adjoints of what leaves the piece -> those of its features, of parameters and of the carry that enters.

        Args:
            features, carry: whether these are wanted; if not, theirs are None and an empty list.
            parameters: those whose gradient is wanted; None for one that the piece does not use.
            retain: keep the graph for another call.
        """
        outputs, adjoints = [], []
        for x, adjoint in [
            *zip(self.outputs, of_outputs, strict=True),
            *zip(self.carry_out, of_carry_out, strict=False),
        ]:
            if adjoint is not None and isinstance(x, Tensor) and x.requires_grad:
                outputs.append(x)
                adjoints.append(adjoint.to(x))
        tracked = [isinstance(x, Tensor) and x.requires_grad for x in self.carry_in]
        of_features: list[Tensor] = self.features if features else []
        of_carry = [x for x, t in zip(self.carry_in, tracked, strict=True) if t] if carry else []
        inputs = [*of_features, *parameters, *of_carry]
        nothing: list[Tensor | None] = [None] * len(self.features)
        if not outputs or not inputs:
            return nothing, [None] * len(parameters), []
        with _no_autocast(outputs[0].device.type), without_hooks(parameters), _arriving_dense(of_carry):
            found = iter(torch.autograd.grad(outputs, inputs, adjoints, retain_graph=retain, allow_unused=True))
        return (
            [next(found) for _ in of_features] or nothing,
            [next(found) for _ in parameters],
            [next(found) if t else None for t in tracked] if carry else [],
        )


@contextmanager
def without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Ask for a part of the gradient of leaves: their own hooks run once, when autograd is handed the whole of it."""
    hooks = [x._backward_hooks for x in leaves if x._backward_hooks]
    kept = [dict(x) for x in hooks]
    for x in hooks:
        x.clear()
    try:
        yield
    finally:
        for x, own in zip(hooks, kept, strict=True):
            x.update(own)


@contextmanager
def unshared_weights() -> Iterator[None]:
    """No weight that is computed from a parameter is kept from one step for the next.

    Autocast's cache of cast weights and ``parametrize.cached()`` would tie the graphs of all groups together, and hand
    weights that were computed without a graph to the groups that need one.
    """
    cast = torch.is_autocast_cache_enabled()
    # PyTorch has no public way to suspend ``cached()``: these two are what it sets itself.
    enabled, cached = parametrize._cache_enabled, parametrize._cache
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cast)
        parametrize._cache_enabled, parametrize._cache = enabled, cached


def not_twice(
    gradients: Sequence[Tensor | None], adjoint: Tensor, sources: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``sources`` that were computed without a graph: they raise when they are differentiated again.

    PyTorch's ``once_differentiable`` does so in ``backward`` only; ``torch.autograd.grad`` passes it by.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if g is None else _NotTwice.apply(g, adjoint, *sources) for g in gradients)


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "This gradient was computed group by group and cannot be differentiated again: use "
            "chopgrad.decode(decoder, latents, Full()), which is one graph."
        )


def total(sums: list[Tensor | None], more: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The sums with one more term each; None where there is none yet."""
    return [x if y is None else y if x is None else x + y for x, y in zip(sums, more, strict=True)]


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())


def _no_autocast(device_type: str) -> Any:
    # Backward formulas choose their own precision; PyTorch asks that autocast not be active around them.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@contextmanager
def _arriving_dense(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Their gradients arrive without the rest of the storage that they are a part of.

    A cached frame enters a convolution beside its group, so its gradient is a narrow view of that of both: kept as it
    comes, it would keep the whole alive until the backward pass of the group before.
    """
    handles = [x.register_hook(_dense_adjoint) for x in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dense_adjoint(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.layout is not torch.strided else dense(x)
