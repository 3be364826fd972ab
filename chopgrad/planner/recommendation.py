"""Which strategy to take, of those whose cost was predicted."""

from __future__ import annotations

from collections.abc import Sequence

from chopgrad.planner.prediction import Prediction

MARGIN = 0.05
"""Share of a memory budget that ``recommend`` leaves free."""


def recommend(
    predictions: Sequence[Prediction], budget_bytes: int, host_budget_bytes: int | None = None
) -> Prediction | None:
    """The cheapest exact strategy that fits; else the truncated one of largest distance; else None.

    Of equally cheap ones, the one that needs least on the device.

    Args:
        budget_bytes: device memory; ``MARGIN`` of it is left free, for what a prediction may be off.
        host_budget_bytes: host memory; a prediction counts twice, because pinned blocks are rounded up to powers of
            two. Default: any.
    """
    fitting = [p for p in predictions if p.device_bytes <= (1 - MARGIN) * budget_bytes]
    if host_budget_bytes is not None:
        fitting = [p for p in fitting if 2 * p.host_bytes <= host_budget_bytes]
    exact = [p for p in fitting if p.distance is None]
    if exact:
        return min(exact, key=lambda p: (round(p.relative_compute, 2), p.device_bytes, p.host_bytes))
    return max(fitting, key=lambda p: (p.distance or 0, -p.relative_compute), default=None)
