"""Temporal locality: fits and verdicts on influences that are known, and the measurement on a small real VAE."""

import json
from functools import cache, partial

import numpy as np
import pytest

import chopgrad
from analysis import real_clips, temporal_locality
from analysis.locality import fits
from analysis.locality.claims import claims, course_claim
from analysis.locality.fits import beyond, curve, held_out_bound, summarise
from analysis.real_clips import Crops, measure_crops
from analysis.temporal_locality import influences
from suite.records import read_record
from tests.analysis.test_gradient_bias import folder  # noqa: F401
from tests.models import build, latents_for

T = 12


def sample(clip, crop, law, scale=1.0, seed=0):
    """Influences of two outputs that follow a law of the distance, with 2 % of noise."""
    rng = np.random.default_rng([seed, crop, *clip.encode()])
    rows = [[scale * law(i - j) * np.exp(0.02 * rng.standard_normal()) for j in range(i + 1)] for i in (7, T - 1)]
    return {"clip": clip, "crop": crop, "outputs": [7, T - 1], "frobenius": rows}


def samples(law, scales=(1.0, 1.0, 1.0)):
    return [sample(c, k, law, scale) for c, scale in zip("abc", scales, strict=True) for k in range(3)]


def decay(d):
    return 5 * np.exp(-0.7 * d)


def flat(d):
    return 3.0 + 0 * d


@cache
def summary(law, scales=(1.0, 1.0, 1.0)):
    return summarise(samples(law, scales))


def verdicts(law, scales=(1.0, 1.0, 1.0), young=flat):
    return [c.verdict for c in claims("x", summary(law, scales), summary(young))]


def test_curve_and_share_of_a_known_sample():
    known = {"outputs": [1, 3], "frobenius": [[5.0, 8.0], [9.0, 1.0, 2.0, 2.0]]}
    assert curve(known) == pytest.approx({0: 4.0, 1: 2.0, 2: 1.0})  # the first latent is left out
    assert curve(known, first=0)[3] == pytest.approx(9.0)
    assert beyond(known, 0) == pytest.approx((81 + 1 + 4) / 90)
    assert beyond(known, 1) == pytest.approx((81 + 1) / 90)
    assert beyond(known, 9) == 0


def test_alpha_is_recovered():
    fitted = summary(decay)
    _, low, high = fitted["alpha_per_group"]
    assert low <= 0.7 <= high
    assert high - low < 0.02
    assert fitted["winner"] == "exponential"
    assert fitted["models"]["exponential"]["C"] == pytest.approx(5, rel=0.03)


def test_verdicts_follow_the_law():
    assert verdicts(decay)[1:] == ["holds", "holds"]
    assert verdicts(lambda d: 5.0 * (1 + d) ** -2)[1] == "fails"
    assert verdicts(lambda d: 5.0 * (1 - d / 13) ** 4)[1] == "holds with correction"
    assert verdicts(flat)[0] == "fails"
    assert verdicts(flat, young=decay)[2] == "fails"
    assert verdicts(decay, young=decay)[2] == "undecided"


def test_a_bound_is_tested_on_clips_that_it_was_not_fitted_on():
    same = held_out_bound(samples(decay))
    assert [row["left_out"] for row in same] == ["a", "b", "c"]
    assert all(row["alpha"] == pytest.approx(0.7, rel=0.03) for row in same)
    assert all(row["largest_ratio"] < 1.2 for row in same)
    other = {row["left_out"]: row for row in held_out_bound(samples(decay, (1.0, 3.0, 1.0)))}
    assert other["b"]["largest_ratio"] == pytest.approx(3, rel=0.2)
    assert other["b"]["share_held"] == 0
    assert other["a"]["share_held"] == 1
    assert verdicts(decay, (1.0, 3.0, 1.0))[0] == "holds with correction"
    assert verdicts(decay, (1.0, 30.0, 1.0))[0] == "fails"
    # With a single clip its crops take turns.
    assert len(held_out_bound([sample("a", k, decay) for k in range(3)])) == 3


def test_the_course_of_training():
    young, old = summary(flat), summary(decay)
    assert course_claim({0: young, 50: old}).verdict == "holds"
    assert course_claim({50: young, 0: old}).verdict == "fails"
    assert course_claim({0: young, 50: young}).verdict == "undecided"
    assert "0: 0." in course_claim({0: young, 50: old}).evidence


def test_the_shape_of_a_measurement():
    vae = build("wan2.1")
    found = influences(chopgrad.decoder_for(vae), latents_for(vae, 8), probes=2, distances=(0, 2, 9))
    assert found["outputs"] == [4, 6, 7]
    assert [len(row) for row in found["frobenius"]] == [5, 7, 8]
    assert [pair[:2] for pair in found["operator"]] == [[2, 2], [4, 2]]  # j = 8 // 3; distance 9 does not exist


def main(source, out, monkeypatch, **changes):
    monkeypatch.setattr(fits, "compare", partial(fits.compare, resamples=20))
    monkeypatch.setattr(temporal_locality.Config, "small_crops", Crops(source / "clips", 2, 9, (8, 8)))
    config = temporal_locality.Config(vaes=(str(source / "vae"),), clips=source / "clips", out=out, **changes)
    temporal_locality.main(config)
    return config


def test_records_of_a_run(folder, tmp_path, monkeypatch):  # noqa: F811
    for step in (0, 50):
        build("wan2.1", seed=step).float().save_pretrained(tmp_path / "snapshots" / f"step-{step:06d}")
    main(folder, tmp_path / "out", monkeypatch, snapshots=tmp_path / "snapshots")
    stems = sorted(p.stem for p in (tmp_path / "out").glob("*.json"))
    assert stems == [
        f"temporal_locality-{s}" for s in ("snapshot-step-000000", "snapshot-step-000050", "vae", "vae-untrained")
    ]
    record = read_record(tmp_path / "out" / "temporal_locality-vae.json")
    assert record.settings["clips"] == ["carphone_pristine.mp4", "a.mkv", "b.mkv"]
    assert len(record.metrics["samples"]) == 6
    assert len(record.metrics["claims"]) == 3
    assert str(folder) not in json.dumps([record.settings, record.metrics])
    assert (tmp_path / "out" / "temporal_locality.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no snapshot folders"):
        main(folder, tmp_path / "out", monkeypatch, snapshots=tmp_path)


class Interrupted(Exception):
    pass


def test_an_interrupted_measurement_goes_on_with_the_same_inputs_only(folder, tmp_path, monkeypatch):  # noqa: F811
    clean = real_clips.provenance() | {"dirty": False}
    monkeypatch.setattr(real_clips, "provenance", lambda *_: dict(clean))
    calls = []

    def measure(limit):
        def one(decoder, latents, video):
            if len(calls) == limit:
                raise Interrupted
            calls.append(latents.shape)
            return {"value": len(calls)}

        crops = Crops(folder / "clips", 2, 9, (8, 8))
        return measure_crops(tmp_path / "r.json", str(folder / "vae"), crops, one, {"x": 1})

    with pytest.raises(Interrupted):
        measure(limit=3)
    assert len(read_record(tmp_path / "r.json").metrics["samples"]) == 3
    assert [s["value"] for s in measure(limit=99).metrics["samples"]] == [1, 2, 3, 4, 5, 6]
    measure(limit=99)
    assert len(calls) == 6  # finished: nothing was measured again
    crops = Crops(folder / "clips", 2, 9, (8, 8))
    measure_crops(
        tmp_path / "r.json", ("vae", build("wan2.1", seed=9).float()), crops, lambda *_: {"value": 0}, {"x": 1}
    )
    assert [s["value"] for s in read_record(tmp_path / "r.json").metrics["samples"]] == [0] * 6  # other weights
    clean["dirty"] = True
    measure(limit=99)
    measure(limit=99)
    assert len(calls) == 18  # uncommitted code is not resumed over


@pytest.mark.filterwarnings("ignore:left out")
def test_clips_that_are_too_short_are_named(folder):  # noqa: F811
    with pytest.warns(UserWarning, match="left out: 'b.mkv' has 11 frames, but 13 are needed"):
        clips, short = Crops(folder / "clips", 1, 13, (8, 8)).clips()
    assert [c.name for c in clips] == ["carphone_pristine.mp4"]
    assert list(short) == ["a.mkv", "b.mkv"]
    with pytest.raises(ValueError, match="has 120 frames, but 5001 are needed"):
        Crops(None, 1, 5001, (8, 8)).clips()
    with pytest.raises(ValueError, match="At least one crop"):
        Crops(None, 0, 9, (8, 8)).clips()
