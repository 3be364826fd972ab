"""Intervals: right as often as they say, and wider when samples of one clip are alike."""

import numpy as np
import pytest

from suite.bootstrap import crossed_interval, mean_interval


# A percentile interval of 30 values is a little narrow, and one of few clips more so.
@pytest.mark.parametrize(("level", "least", "most"), [(0.5, 0.42, 0.55), (0.8, 0.72, 0.84), (0.95, 0.89, 0.97)])
def test_the_interval_holds_the_mean_about_as_often_as_it_says(level, least, most):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(500):
        mean, low, high = mean_interval(rng.normal(3.0, 2.0, size=30), level=level, resamples=400, seed=trial)
        assert low <= mean <= high
        hits += low <= 3.0 <= high
    assert least < hits / 500 < most


def test_only_clusters_keep_the_level_when_samples_of_a_clip_are_alike():
    rng = np.random.default_rng(0)
    clips = np.repeat(np.arange(20), 6)
    hits = np.zeros(2)
    for trial in range(300):
        values = rng.normal(3.0, 2.0, size=20)[clips] + 0.5 * rng.normal(size=120)
        for k, clusters in enumerate((clips.tolist(), None)):
            _, low, high = mean_interval(values, clusters, resamples=400, seed=trial)
            hits[k] += low <= 3.0 <= high
    clustered, naive = hits / 300
    assert 0.87 < clustered < 0.98
    assert naive < 0.7


def test_clips_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    clips = np.repeat(np.arange(5), 20)
    values = clips + 0.1 * rng.normal(size=100)
    _, low, high = mean_interval(values)
    _, clustered_low, clustered_high = mean_interval(values, clips.tolist())
    assert clustered_high - clustered_low > 2 * (high - low)


def test_one_value_has_no_width_and_no_value_is_an_error():
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])
    with pytest.raises(ValueError, match="Got 2 values but 1 clusters"):
        mean_interval([1.0, 2.0], ["a"])


def test_it_is_seeded():
    values = np.random.default_rng(0).normal(size=30).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_with_a_single_clip_its_samples_are_drawn():
    values = np.random.default_rng(0).normal(size=12).tolist()
    assert mean_interval(values, ["a"] * 12) == mean_interval(values)


def crossed(of_seeds, of_clips, noise=0.0, rng=None):
    grid = of_seeds[:, None] + of_clips[None, :]
    grid = grid + noise * rng.normal(size=grid.shape) if noise else grid
    return {(i, j): x for (i, j), x in np.ndenumerate(grid)}


@pytest.mark.parametrize(("seeds", "clips"), [(2.0, 0.2), (0.2, 2.0)])
def test_crossed_samples_keep_the_level_whichever_origin_varies(seeds, clips):
    """Clips drawn within seeds would be as many clips as there are pairs."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for trial in range(300):
        values = crossed(rng.normal(3.0, seeds, size=12), rng.normal(0.0, clips, size=20), 0.3, rng)
        intervals = (
            crossed_interval(values, resamples=400, seed=trial),
            mean_interval(list(values.values()), [i for i, _ in values], resamples=400, seed=trial),
        )
        hits += [low <= 3.0 <= high for _, low, high in intervals]
    ours, nested = hits / 300
    assert 0.86 < ours < 0.98
    if clips > seeds:
        assert nested < 0.7


def test_a_crossed_interval_of_one_seed_is_that_of_its_clips():
    values = {(0, j): x for j, x in enumerate(np.random.default_rng(0).normal(size=30))}
    _, low, high = crossed_interval(values)
    assert (low, high) == pytest.approx(mean_interval(list(values.values()))[1:], abs=0.05)
    assert crossed_interval({(0, 0): 2.0}) == (2.0, 2.0, 2.0)


def test_pairs_may_be_missing_from_a_crossed_interval():
    values = crossed(np.arange(4.0), np.arange(6.0))
    del values[0, 0], values[3, 5]
    mean, low, high = crossed_interval(values)
    assert mean == pytest.approx(np.mean(list(values.values())))
    assert 0 < low < mean < high < 8
    with pytest.raises(ValueError, match="at least one value"):
        crossed_interval({})
