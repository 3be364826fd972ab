"""Other ways to spend the compute: verdicts on made-up numbers, and the whole script on a small VAE."""

import runpy
import sys

import pytest
import torch

from analysis.estimation.randomised import crossing, randomised_claims
from analysis.estimators import CASES
from chopgrad import Chop
from chopgrad.planner import relative_compute
from suite.records import ROOT, read_record
from tests.models import build


def test_where_biased_and_unbiased_cross():
    """Clips' gradients with a known mean, bias, spread and variance of the draws."""
    generator = torch.Generator().manual_seed(0)
    clips, size = 300, 500
    mean = torch.zeros(size)
    mean[0] = 1.0
    data = 0.5 * torch.randn(clips, size, generator=generator) / size**0.5  # variance 0.25 of a clip
    full = mean + data
    chopped = 0.8 * full  # bias 0.2^2 = 0.04, variance 0.16
    counts = torch.ones(3, clips, dtype=torch.float64)
    found = crossing(chopped, full, torch.full((clips,), 0.31, dtype=torch.float64), counts)
    assert found["relative"]["bias"] == pytest.approx(0.04, rel=0.1)
    assert found["relative"]["data_full"] == pytest.approx(0.25, rel=0.1)
    assert found["relative"]["data_truncated"] == pytest.approx(0.16, rel=0.1)
    # 0.04 + 0.16 / n = (0.25 + 0.31) / n at n = 10.
    assert 1 / found["inverse_crossing"][0] == pytest.approx(10, rel=0.15)
    none = crossing(full, full, torch.full((clips,), 0.31, dtype=torch.float64), counts)
    assert none["inverse_crossing"][0] == 0  # without bias it never pays


def interval(x):
    return [x, x - 0.01, x + 0.01]


@pytest.mark.parametrize(
    ("truncated_error", "crossing", "verdicts"),
    [
        (0.3, 1 / 1000, ["fails", "fails", "fails"]),
        (0.3, 1 / 20, ["fails", "holds", "fails"]),
        (3.0, 1 / 20, ["holds", "holds", "fails"]),
        (1.0, 1 / 80, ["undecided", "undecided", "fails"]),
    ],
)
def test_verdicts_on_randomised_truncation(truncated_error, crossing, verdicts):
    place = {"truncated": interval(truncated_error), "tuned": interval(1.0)}
    crossings = {"inverse_crossing": [crossing, 0.9 * crossing, 1.1 * crossing]}
    rows = [{"distance": 1, "latents": place, "backbone": place | {"mean_of_n_tuned": crossings}}]
    chunks = [{"block": 2, "fixed": interval(0.5), "artbp": interval(0.9)}]
    assert [c.verdict for c in randomised_claims(rows, chunks)] == verdicts


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_films):
    """The whole script on a small random VAE: the folder of its VAE and that of its records."""
    folder = tmp_path_factory.mktemp("estimators")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        script(folder, patch)
    return folder


def script(folder, monkeypatch, *more):
    task = {"vae": folder / "vae", "frames": 13, "size": 16, "width": 32, "layers": 1}
    task |= {"warm-up-steps": 2, "warm-up-clips": 4}
    words = [w for k, v in task.items() for w in (f"--task.{k}", str(v))]
    words += ["--count", "4", "--calls", "5", "--repeats", "1", "--tolerances", "0.1", "0.8"]
    words += ["--out", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "analysis" / "estimators.py"), *words, *more])
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_the_script_measures(made):
    records = {case: read_record(made / "out" / f"estimators-{case}.json") for case in CASES}
    assert (made / "out" / "estimators.png").stat().st_size > 10_000
    assert all(record.metrics["claims"] for record in records.values())
    blocks = {(r["block"], r["distance"]): r for r in records["look_ahead"].metrics["rows"]}
    assert blocks[2, 1]["memory_groups"] == 3
    assert blocks[2, 1]["relative_compute"] == relative_compute(Chop(1, block=2), 7)
    assert blocks[1, 5]["relative_error"][0] < blocks[1, 0]["relative_error"][0]


def test_the_adaptive_case_runs_what_it_says(made):
    rows = read_record(made / "out" / "estimators-adaptive.json").metrics["rows"]
    for row in rows:
        assert all(call["parity"] < 1e-3 for call in row["calls"])  # it was that truncation
        assert row["calls"][0]["forwards_per_group"] > 1  # a probe decodes too
        assert row["calls"][1]["forwards_per_group"] == 1
        assert row["kept"][0] == sum(c["realised_error"] <= row["tolerance"] for c in row["calls"]) / 5
    assert rows[0]["distance"][0] >= rows[1]["distance"][0]


def test_all_losses_have_no_variance(made):
    rows = read_record(made / "out" / "estimators-sampled.json").metrics["rows"]
    for row in rows:
        if row["count"] == 7:
            assert row["rmse_latents"][0] < 1e-6 and row["time_ratio"] == [1, 1, 1]
        else:
            assert row["rmse_backbone"][0] > 0.1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--cases", "psnr"], "error: Unknown case 'psnr': pass some of look_ahead"),
        (["--count", "3"], "error: At least 4 clips"),
        (["--distances", "6"], "error: The clips have 7 frame groups: pass --distances between 1 and 5"),
        (["--tolerances", "0"], "error: At least 4 clips, 1 call, 1 repeat and tolerances above 0"),
    ],
)
def test_the_script_ends_in_one_sentence(made, monkeypatch, more, sentence):
    with pytest.raises(SystemExit, match=sentence) as end:
        script(made, monkeypatch, *more)
    assert "\n" not in str(end.value)
