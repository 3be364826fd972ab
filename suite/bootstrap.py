"""Bootstrap intervals: what a mean over few clips or seeds is worth."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np


def mean_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap interval of the mean.

    Args:
        values: one number per sample.
        clusters: the clip of each sample. Samples of one clip are alike, so whole clips are drawn first and then
            samples within each, which keeps the interval honest; with a single clip only its samples are drawn.

    Raises:
        ValueError: no values, or as many clusters as values are not given.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("An interval needs at least one value, got none.")
    if clusters is None:
        groups = [data]
    else:
        if len(clusters) != len(values):
            raise ValueError(f"Got {len(values)} values but {len(clusters)} clusters: pass one cluster per value.")
        names = list(dict.fromkeys(clusters))
        groups = [data[[c == name for c in clusters]] for name in names]
    rng = np.random.default_rng(seed)
    sums, counts = np.zeros(resamples), np.zeros(resamples)
    picks = rng.integers(len(groups), size=(resamples, len(groups)))
    for index, group in enumerate(groups):
        for chosen in (picks == index).T:
            rows = np.flatnonzero(chosen)
            sums[rows] += group[rng.integers(group.size, size=(rows.size, group.size))].sum(1)
            counts[rows] += group.size
    low, high = np.quantile(sums / counts, [(1 - level) / 2, (1 + level) / 2])
    return float(data.mean()), float(low), float(high)


def crossed_interval(
    values: Mapping[tuple[Hashable, Hashable], float], level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) where every sample has two origins, as a seed and a test clip that all seeds share.

    Both are drawn, independently of each other (Owen 2007, "The pigeonhole bootstrap"). Clips drawn anew within each
    seed would count the same clip as another one for each seed, and give too narrow an interval.

    Args:
        values: (seed, clip) -> number; pairs may be missing.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("An interval needs at least one value, got none.")
    rows, columns = (list(dict.fromkeys(key[k] for key in values)) for k in (0, 1))
    table, there = np.zeros((2, len(rows), len(columns)))
    for (row, column), value in values.items():
        table[rows.index(row), columns.index(column)] = value
        there[rows.index(row), columns.index(column)] = 1
    rng = np.random.default_rng(seed)
    by_row, by_column = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in table.shape)
    sums, counts = (np.einsum("ri,ij,rj->r", by_row, x, by_column, optimize=True) for x in (table, there))
    low, high = np.quantile((sums / counts)[counts > 0], [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(list(values.values()))), float(low), float(high)
