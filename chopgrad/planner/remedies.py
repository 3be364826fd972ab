"""What would fit where nothing does: computed, one change at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

from chopgrad.planner.estimate import Estimator
from chopgrad.planner.prediction import Prediction
from chopgrad.recurrence import Checkpoint
from chopgrad.strategies import Exact, Strategy

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
"""Of height and width."""


class Remedy(NamedTuple):
    """A change with which something fits."""

    change: str
    """In the words of the command line, such as "--frames 49"; empty where only the strategy is another."""
    prediction: Prediction


def remedies(
    estimator: Estimator,
    strategies: Sequence[Strategy],
    best_of: Callable[[list[Prediction]], Prediction | None],
    checkpoint: Checkpoint | Literal["best"],
    size: tuple[int, int],
    multiple: int,
    dtype: str,
    other: Callable[[tuple[int, int], str], Estimator],
) -> Iterator[Remedy]:
    """More strips and sparser states; and where these do not do, a checkpoint, fewer frames, another dtype, a smaller
    size.

    Args:
        best_of: what is recommended of predictions; None where nothing fits.
        checkpoint: the one that was asked for, or "best".
        multiple: height and width must be multiples of it.
        other: the same video in another size and dtype.

    Cost: a second for each other size or dtype, of which there are at most seven.
    """
    for strips, every in product((None, 16, 32, 64), range(1, estimator.groups() + 1)):
        some = Exact(offload=True, pieces=True, every=every if every > 1 else None, strips=strips)
        found = best_of(estimator.of([some], checkpoint))
        if found:
            yield Remedy("", found)
            return
    if checkpoint != "best":
        found = best_of(estimator.of(strategies, "best"))
        if found:
            yield Remedy("--checkpoint best", found)
    for length, frames in estimator.shorter():
        found = best_of(estimator.at(length, strategies, checkpoint))
        if found:
            yield Remedy(f"--frames {frames}", found)
            break
    if dtype == "float32":
        found = best_of(other(size, "bfloat16").of(strategies, checkpoint))
        if found:
            yield Remedy("--dtype bfloat16", found)
    tried = {size}
    for share in SHARES:
        height, width = (int(n * share) // multiple * multiple for n in size)
        if (height, width) in tried or not height or not width:
            continue
        tried.add((height, width))
        found = best_of(other((height, width), dtype).of(strategies, checkpoint))
        if found:
            yield Remedy(f"--size {height}x{width}", found)
            return
