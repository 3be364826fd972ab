"""Intervals: right as often as they say, and wider when samples of one clip are alike."""

import numpy as np
import pytest

from suite.bootstrap import mean_interval


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
