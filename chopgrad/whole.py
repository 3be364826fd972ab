"""A recurrence as one node of autograd: what it yields whole, and a reverse sweep as its backward pass.

``chopgrad.decode`` and ``chopgrad.encode`` are this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from chopgrad.autocast import Autocast
from chopgrad.automatic import again_with_less, with_room
from chopgrad.engine import Carry, Gradients, Kept, Sweep
from chopgrad.graph import not_twice, unshared_weights
from chopgrad.inputs import check_dropout, check_inputs, check_sampled, check_tangent, trained_parameters
from chopgrad.recurrence import Group, Recurrence
from chopgrad.strategies import Full, Strategy


def run_whole(
    model: Recurrence, source: Tensor, strategy: Strategy, groups: slice | None = None, history: bool = True
) -> Tensor:
    """What the model makes of ``source``, differentiable as the strategy says (see ``chopgrad.decode``).

    Args:
        source: [batch, channels, length, h, w].
        groups: only what these groups yield.
        history: whether groups before them get a gradient.
    """
    check_sampled(strategy, model.part)
    spans = check_inputs(model, source, strategy)
    chosen = _chosen(groups, len(spans))
    first = 0 if history else chosen.start
    if isinstance(strategy, Full):
        return _in_one_graph(model, source, spans, chosen, first)
    check_tangent(source)
    check_dropout(model, strategy)
    parameters = trained_parameters(model, source, depth=5)

    def run(strategy: Strategy) -> Tensor:
        # A copy: what is set on it later is for later calls.
        call = _Call(copy(model), spans, strategy, chosen, first, source.requires_grad, parameters)
        if torch.is_grad_enabled() and (source.requires_grad or parameters):
            return _Run.apply(call, source, *parameters)
        with torch.no_grad():
            return call.run(source, keep=False)[0]

    return with_room(strategy, model, source, spans[: chosen.stop], False, run)


@dataclass(frozen=True)
class _Call:
    model: Recurrence
    spans: Sequence[Group]
    strategy: Strategy
    chosen: range
    first: int
    source_needs_grad: bool
    parameters: list[Any]

    def sweep(self, source: Tensor) -> Sweep:
        plan = self.strategy.plan()
        origin = self.chosen.start
        return Sweep(
            self.model, self.spans, plan, source.detach(), self.source_needs_grad, self.parameters, self.chosen,
            self.first, origin,
        )  # fmt: skip

    def place(self, i: int) -> slice:
        """Where what group i yields is in what was asked for."""
        start, yields = self.spans[self.chosen.start].yields.start, self.spans[i].yields
        return slice(yields.start - start, yields.stop - start)

    def run(self, source: Tensor, keep: bool) -> tuple[Tensor, Kept]:
        """What was asked for, and what a sweep begins with."""
        found: list[Tensor] = []
        length = self.place(self.chosen[-1]).stop

        def see(i: int, y: Tensor) -> None:
            if i in self.chosen:
                if not found:
                    found.append(y.new_empty(*y.shape[:2], length, *y.shape[3:]))
                found[0][:, :, self.place(i)] = y

        with unshared_weights():
            sweep = self.sweep(source)
            kept = sweep.decode(see, keep)
            if keep:
                sweep.host.land()  # autograd is handed the states, and hooks of the user's may read what it saves
        return found[0], kept


class _Run(torch.autograd.Function):
    """Forward: run without graphs and keep the states that the strategy wants. Backward: the engine's sweep."""

    @staticmethod
    def forward(ctx: Any, call: _Call, source: Tensor, *parameters: Tensor) -> Tensor:
        found, kept = call.run(source, keep=True)
        ctx.call, ctx.autocast = call, Autocast.now(source.device.type)
        ctx.states, tensors = _Packed.of(kept.carries)
        ctx.graphs = kept.graphs  # used up by the first backward pass; a second one builds them again
        # Weights are saved for the check that they have not been changed, states so that autograd frees them.
        ctx.weights, ctx.settings = _weights(call.model), _settings(call.model)
        ctx.save_for_backward(source, *tensors, *ctx.weights)
        return found

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        source, *tensors = ctx.saved_tensors
        sources = [source, *call.parameters]
        call.model.onload()
        check_dropout(call.model, call.strategy)
        changed = [name for name, value in _settings(call.model).items() if ctx.settings.get(name) != value]
        if changed:
            raise RuntimeError(f"vae.{changed[0]} was changed before the backward pass: do so afterwards.")
        # Weights that wait on meta are new objects whenever accelerate's hooks have brought them.
        now = _weights(call.model)
        if len(now) != len(ctx.weights) or any(a is not b and not b.is_meta for a, b in zip(now, ctx.weights)):
            raise RuntimeError(
                f"The {call.model.part}'s weights or modules were replaced before the backward pass: do so afterwards."
            )
        with torch.no_grad(), ctx.autocast.again(), unshared_weights(), requiring_grad(call.parameters):
            begun: Kept | None = Kept(ctx.states.unpack(tensors), ctx.graphs)

            def pull(strategy: Strategy) -> Gradients:
                nonlocal begun
                sweep = replace(call, strategy=strategy).sweep(source)
                for i in call.chosen:
                    sweep.add_adjoint(i, adjoint[:, :, call.place(i)])
                given, begun = begun, None  # what was begun in another form is of no use
                return sweep.gradients(begun=given)

            gradients = again_with_less(call.strategy, call.model, pull)
            found = [gradients.source, *gradients.parameters]
            found = [None if g is None else g.to(x.dtype) for g, x in zip(found, sources, strict=True)]
        return None, *not_twice(found, adjoint, sources)


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


def _settings(model: Recurrence) -> dict[str, Any]:
    """What is set on the VAE itself, such as tiles and windows."""
    plain = bool | int | float | str | tuple | None
    values = vars(model.vae).items()
    return {name: x for name, x in values if isinstance(x, plain) and name[0] != "_" and name != "training"}


def _weights(model: Recurrence) -> list[Tensor]:
    return list({id(x): x for x in (*model.parameters(), *model.vae.buffers())}.values())


@contextmanager
def requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
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
        raise TypeError(f"groups must be a slice of groups without a step, such as slice(2, 4), got {groups!r}.")
    chosen = range(count)[groups]
    if not chosen:
        raise ValueError(f"groups={groups} has none of the {count} groups in which this runs.")
    return chosen


def _in_one_graph(model: Recurrence, source: Tensor, spans: Sequence[Group], chosen: range, first: int) -> Tensor:
    state, found = model.initial_state(), []
    for i in range(chosen.stop):
        with nullcontext() if i >= first else torch.no_grad():
            y, state = model.step(source[:, :, spans[i].takes], state)
        if i in chosen:
            found.append(y)
    return torch.cat(found, dim=2)
