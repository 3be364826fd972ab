"""Bootstrap intervals: what a mean over few clips or seeds is worth."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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
