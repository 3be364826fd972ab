"""``Exact()`` and ``strips="auto"``: the fastest form that fits, worked out from the memory that is free."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from chopgrad.autocast import Autocast
from chopgrad.memory import available_bytes
from chopgrad.pieces.plain import predicted_under, written_forward
from chopgrad.recurrence import Group, Recurrence
from chopgrad.strategies import Chop, Exact, Plan, Sampled, Strategy

_log = logging.getLogger("chopgrad")
_T = TypeVar("_T")

MARGIN = 0.1
"""Share of the memory that is free which is left so: what a prediction may be off, workspaces, fragmentation."""
OF_LOSS = 0.4
"""Share that is left to a loss outside of ``decode``, whose own graph nobody here knows."""
FOLLOWED = 1.05
"""Strips take up to that times what is found by following them."""
OF_STRIPS = 1.4
"""Times what they take, strips are estimated at most. Where the estimate could fit they are followed."""
STRIPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SMALL = 1_000_000
"""The graph of a published decoder takes up to 170,000 times its latents. Where so many times fit, nothing is asked."""


@dataclass(frozen=True, repr=False)
class Form(Exact):
    """What was chosen, with settings that nobody needs to choose.

    Args:
        settings: what the engine reads.
        key: where the decoder keeps the choice.
    """

    settings: Plan | None = None
    key: Any = None

    @property
    def is_automatic(self) -> bool:
        return False

    def plan(self) -> Plan:
        assert self.settings is not None
        return self.settings

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        plan = self.plan()
        if plan.strips:
            walked = f"pieces in {plan.strips} strips"
        elif plan.pieces:
            kept = f"inputs of {plan.resident} on the device" if plan.resident else "their inputs on the host"
            walked = "pieces" + (f", {kept}" if plan.offload else "")
        else:
            walked = f"whole groups, graphs of the last {plan.graphs} kept" if plan.graphs else "whole groups"
        every = "every state kept" if (plan.every or 1) == 1 else f"every {plan.every}-th state kept"
        return f"{walked}; {every} on the {'host' if plan.offload else 'device'}"


@dataclass(frozen=True)
class Choice:
    """What was chosen for sources of one shape.

    Args:
        ladder: the forms from the one that was chosen down, each of less memory and more time.
        device_bytes, host_bytes: what the chosen one is predicted to take beyond what was there.
    """

    ladder: tuple[Form, ...]
    device_bytes: int
    host_bytes: int

    @property
    def form(self) -> Form:
        return self.ladder[0]

    def lower(self) -> Choice | None:
        """One step down."""
        return Choice(self.ladder[1:], 0, 0) if len(self.ladder) > 1 else None


def with_room(
    strategy: Strategy,
    model: Recurrence,
    source: Tensor,
    groups: Sequence[Group],
    streams: bool,
    run: Callable[[Strategy], _T],
    repeatable: Callable[[], bool] = lambda: True,
) -> _T:
    """``run(strategy)``, with what is left to us chosen; one step further down where that runs out of memory.

    Args:
        streams: the loss sees one group at a time.
        repeatable: see ``again_with_less``.
    """
    inner = strategy.strategy if isinstance(strategy, Sampled) else strategy
    if not isinstance(inner, Exact | Chop) or not inner.is_automatic:
        return run(strategy)
    key = _key(inner, model, source, len(groups), streams)
    if key not in model.chosen:
        model.chosen[key] = choose(inner, model, source, groups, streams)
    form = replace(model.chosen[key].form, key=key)
    chosen = replace(strategy, strategy=form) if isinstance(strategy, Sampled) else form
    return again_with_less(chosen, model, run, repeatable)


def again_with_less(
    strategy: Strategy, model: Recurrence, run: Callable[[Strategy], _T], repeatable: Callable[[], bool] = lambda: True
) -> _T:
    """``run(strategy)``; if it runs out of memory and was chosen by us, once more in the form below it.

    Args:
        repeatable: False: the error is handed on, and the form below is for the next call.
    """
    form = strategy.strategy if isinstance(strategy, Sampled) else strategy
    if not isinstance(form, Form):
        return run(strategy)
    try:
        return run(strategy)
    except torch.OutOfMemoryError as error:
        # Another call may have stepped down meanwhile.
        lower = model.chosen.get(form.key)
        if lower is not None and lower.form.settings == form.settings:
            lower = lower.lower()
        if lower is None:
            raise
        if not repeatable():
            model.chosen[form.key] = lower
            error.add_note(
                "It ran out in the loss, which cannot be called twice, or between blocks of groups. The next call will "
                f"be with {lower.form}."
            )
            raise
    # Out of the except clause, so that what the failed attempt held is let go of.
    model.chosen[form.key] = lower
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _log.warning("%s: out of memory, in spite of the prediction; going on with %s.", form.key.strategy, lower.form)
    form = replace(lower.form, key=form.key)
    return run(replace(strategy, strategy=form) if isinstance(strategy, Sampled) else form)


class _Key(NamedTuple):
    """What a choice depends on."""

    strategy: Exact | Chop
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    groups: int
    streams: bool
    checkpoint: Any
    graded: Any
    """Whether the source has a gradient, and which parameters have one."""
    around: tuple[bool, ...]
    """Which modules have a hook or a wrapper, and are called as they are."""
    autocast: Autocast


def _key(strategy: Exact | Chop, model: Recurrence, source: Tensor, groups: int, streams: bool) -> _Key:
    trained = tuple(p.requires_grad for p in model.parameters())
    return _Key(
        strategy, tuple(source.shape), source.dtype, source.device, groups, streams, model.checkpoint,
        torch.is_grad_enabled() and (source.requires_grad, trained),
        tuple(written_forward(module) is None for module in model.vae.modules()), Autocast.now(source.device.type),
    )  # fmt: skip


def choose(strategy: Exact | Chop, model: Recurrence, source: Tensor, groups: Sequence[Group], streams: bool) -> Choice:
    """The fastest form that fits, from the planner's formulas; said in one line of the log.

    Cost: a second or two, once for each shape of the source. Nothing where any form would fit, where it is not known
    what is free, and where no gradient is wanted.
    """
    if not (torch.is_grad_enabled() and (source.requires_grad or any(p.requires_grad for p in model.parameters()))):
        return Choice((Form(settings=Plan(None, 0, True, False, pieces=model.is_composed)),), 0, 0)
    budget = _budget(strategy, source, streams)
    if strategy.strips == "auto":
        forms = _in_strips(strategy)
        safest = forms[-1]
    else:
        forms = list(_forms(model, len(groups), moves=source.device.type not in ("cpu", "meta")))
        safest = next((form for form in forms if form.plan().pieces and form.plan().resident == 0), forms[-1])
    if budget is None:
        return Choice((safest,), 0, 0)
    if source.nbytes * SMALL <= budget.device_bytes:
        return Choice((forms[0], safest), 0, 0)
    try:
        with predicted_under(Autocast.now(source.device.type).enabled):
            price = _prices(model, source, groups, streams)
            ladder = _ladder(strategy, forms, price, budget)
    except Exception as error:  # a model that cannot be copied to meta, or does not run there
        _log.warning("%s: what it takes could not be predicted, so it takes little: %s", strategy, error)
        return Choice((safest,), 0, 0)
    best = ladder[0]
    _log.info(
        "%s: %s; predicted to take %.2f of %.2f GiB on the device and %.2f of %.2f GiB on the host",
        strategy, best.form,
        *(x / 2**30 for x in (best.device_bytes, budget.device_bytes, best.host_bytes, budget.host_bytes)),
    )  # fmt: skip
    return Choice(tuple(cost.form for cost in ladder), best.device_bytes, best.host_bytes)


class _Cost(NamedTuple):
    form: Form
    seconds: float
    device_bytes: int
    host_bytes: int


class _Budget(NamedTuple):
    device_bytes: int
    host_bytes: int


def _budget(strategy: Exact | Chop, source: Tensor, streams: bool) -> _Budget | None:
    """What may be taken beyond what is there; None where nobody knows what is free."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = max(1, int(told)) if told.isdecimal() else 1
    on_host = available_bytes("cpu")
    host = 2**62 if on_host is None else on_host // (2 * share)
    if isinstance(strategy, Exact) and strategy.within_bytes is not None:
        return _Budget(strategy.within_bytes, host)
    free = available_bytes(source.device)
    if free is None:
        return None
    if source.device.type == "cpu":
        free //= share
    return _Budget(int(free * (1 - MARGIN) * (1 if streams else 1 - OF_LOSS)), host)


def _in_strips(strategy: Exact | Chop) -> list[Form]:
    """The strategy with each number of strips."""
    return [Form(settings=replace(strategy.plan(), strips=count)) for count in STRIPS]


def _forms(model: Recurrence, groups: int, moves: bool) -> Iterator[Form]:
    """Everything that may be taken, roughly from the fastest down.

    Args:
        moves: the host is other memory than the device's.
    """
    spacings = sorted({1, *(isqrt(groups) // k for k in (1, 2, 3)), min(2, groups)} - {0})

    def forms(**settings: Any) -> Iterator[Form]:
        for every in spacings:
            yield Form(settings=Plan(**{"block": None, "distance": 0, "recompute": True, "every": every, **settings}))

    for graphs in sorted({max(1, groups * k // 32) for k in range(1, 33)}, reverse=True):
        yield Form(settings=Plan(None, 0, True, False, graphs=graphs))
    yield from forms(offload=False)
    if moves:
        yield from forms(offload=True)
    if not model.is_composed:
        return
    count = len(model.pieces())
    if moves:
        for resident in sorted({count * k // 8 for k in range(9)}, reverse=True):
            yield from forms(offload=True, pieces=True, resident=resident)
    yield from forms(offload=False, pieces=True)
    for strips in STRIPS:
        yield from forms(offload=moves, pieces=True, strips=strips)


def _prices(model: Recurrence, source: Tensor, groups: Sequence[Group], streams: bool) -> Callable[[Form, bool], _Cost]:
    """What a form takes beyond the weights and the source, and how long, on a card of today; ``need`` says of what use
    the flag is.
    """
    from chopgrad.planner.formulas import Surroundings, need
    from chopgrad.planner.profile import Profile, on_meta, profile
    from chopgrad.planner.seconds import H200, seconds

    graded = source.requires_grad
    twin, batch = on_meta(model), source.shape[0]

    @cache
    def profiled(pieces: bool) -> Profile:
        walked = twin.for_pieces() if pieces else twin
        size = (source.shape[2], *source.shape[3:])
        return profile(walked, size, source.dtype, source_needs_grad=graded, batch=batch, beginning=True)

    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    yields = [x.yields_bytes for x in (*profiled(False).first, profiled(False).steady)]
    length = groups[-1].yields.stop
    whole = max(yields) * length // max(group.yields.stop - group.yields.start for group in groups)
    of_gradients = source.nbytes * graded + trained
    # The loss of a group: its target, and two tensors of its size. A whole video's: its frames and their adjoint.
    around = Surroundings(streams, 3 * max(yields) if streams else 0, 0 if streams else 2 * whole, of_gradients)

    def price(form: Form, follow: bool) -> _Cost:
        found = profiled(form.plan().pieces)
        device, host, _ = need(form, found, around, follow)
        device -= found.weight_bytes + found.source_bytes
        if follow and form.plan().strips:
            device = int(FOLLOWED * device)
        return _Cost(form, seconds(form, found, H200, streams), device, host)

    return price


def _ladder(
    strategy: Strategy, forms: Sequence[Form], price: Callable[[Form, bool], _Cost], budget: _Budget
) -> list[_Cost]:
    """The fastest that fits, or else that of least memory on the device; and from there down."""
    costs = [price(form, False) for form in forms]
    ordered = sorted(costs, key=lambda cost: (cost.seconds, cost.device_bytes, cost.host_bytes))
    on_host = [cost for cost in ordered if cost.host_bytes <= budget.host_bytes] or ordered
    ladder: list[_Cost] = []
    for cost in on_host:
        if not ladder and cost.form.plan().strips and cost.device_bytes <= OF_STRIPS * budget.device_bytes:
            cost = price(cost.form, True)
        if cost.device_bytes <= (0.8 * ladder[-1].device_bytes if ladder else budget.device_bytes):
            ladder.append(cost)
    if not ladder:
        least = min(on_host, key=lambda cost: cost.device_bytes)
        _log.warning(
            "%s: nothing fits %.2f GiB; the least is about %.2f GiB, with %s.",
            strategy, budget.device_bytes / 2**30, least.device_bytes / 2**30, least.form,
        )  # fmt: skip
        return [least]
    return ladder
