"""Which strategy to take, of those whose cost was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import log

from chopgrad.planner.prediction import Prediction

MARGIN = 0.05
"""Share of a memory budget that ``recommend`` leaves free."""


def recommend(
    predictions: Sequence[Prediction], budget_bytes: int, host_budget_bytes: int | None = None
) -> Prediction | None:
    """The quickest exact strategy that fits; else the truncated one of largest distance; else None.

    Of equally quick ones, the one that needs least on the device.

    Args:
        budget_bytes: device memory; ``MARGIN`` of it is left free, for what a prediction may be off.
        host_budget_bytes: host memory; a prediction counts twice, because pinned blocks are rounded up to powers of
            two. Default: any.
    """
    fitting = [p for p in predictions if fits(p, budget_bytes, host_budget_bytes)]
    exact = [p for p in fitting if p.distance is None]
    if exact:
        return min(exact, key=lambda p: (round(_time(p), 2), p.device_bytes, p.host_bytes))
    return max(fitting, key=lambda p: (p.distance or 0, -_time(p)), default=None)


def fits(prediction: Prediction, budget_bytes: int, host_budget_bytes: int | None = None) -> bool:
    """Whether a prediction is within the budgets, as ``recommend`` counts."""
    on_host = host_budget_bytes is None or 2 * prediction.host_bytes <= host_budget_bytes
    return prediction.device_bytes <= (1 - MARGIN) * budget_bytes and on_host


def frontier(predictions: Sequence[Prediction], least: int = 5, most: int = 8) -> list[Prediction]:
    """Those that no other is at least as good as in device memory, host memory, time and gradient.

    Where they are fewer than ``least``, of the rest those that are best without them are added; of more than ``most``,
    of the two that are most alike the slower is left out, again and again, but for the exact one of least memory. In
    the order in which they were given.
    """
    rest: list[Prediction] = list(predictions)
    found: list[Prediction] = []
    while rest and len(found) < least:
        best = [p for p in rest if not any(_beats(q, p) for q in rest if q is not p)]
        found += best if not found else best[: least - len(found)]
        rest = [p for p in rest if all(p is not q for q in found)]
    while len(found) > most:
        pair = min(combinations(found, 2), key=lambda pair: _apart(*pair))
        kept = min(found, key=lambda p: (p.distance is not None, p.device_bytes, _time(p)))
        slower = max(pair, key=lambda p: (p is not kept, _time(p), p.distance is not None, p.device_bytes))
        found = [p for p in found if p is not slower]
    return [p for p in predictions if any(p is q for q in found)]


def _beats(a: Prediction, b: Prediction) -> bool:
    """a is nowhere worse than b, as a table shows them, and somewhere better."""

    def shown(p: Prediction) -> tuple[float, ...]:
        reach = float("inf") if p.distance is None else p.distance
        return round(p.device_bytes / 2**30, 1), round(p.host_bytes / 2**30, 1), round(_time(p), 2), -reach

    pairs = list(zip(shown(a), shown(b), strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def _apart(a: Prediction, b: Prediction) -> float:
    """Squared distance in logarithms of bytes (from a GiB up) and time."""

    def logarithms(p: Prediction) -> tuple[float, ...]:
        return log(2**30 + p.device_bytes), log(2**30 + p.host_bytes), log(_time(p))

    return sum((x - y) ** 2 for x, y in zip(logarithms(a), logarithms(b), strict=True))


def _time(prediction: Prediction) -> float:
    found = prediction.relative_seconds
    return prediction.relative_compute if found is None else found
