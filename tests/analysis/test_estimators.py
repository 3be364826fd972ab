"""Random estimators of the gradient: unbiased and of the stated variance, by enumeration of every draw."""

import itertools
import runpy
import sys

import pytest
import torch

from analysis.estimation.randomised import crossing, randomised_claims
from analysis.estimators import CASES
from chopgrad import Chop
from chopgrad.planner import relative_compute
from suite import random_truncation as rt
from suite.pairwise import truncated
from suite.records import ROOT, read_record
from tests.models import build

T = 5


@pytest.fixture(scope="module")
def pairs():
    """Random pairwise gradients that decay with distance, zero against causality."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(T, T, 2, 3, generator=generator, dtype=torch.float64)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    return values * ((i >= j) * 0.6 ** (i - j).clamp(min=0))[:, :, None, None]


def probabilities(survival):
    """P(R = d) from P(R >= d)."""
    return survival - torch.cat([survival[1:], survival.new_zeros(1)])


SURVIVALS = [torch.tensor([1, 0.7, 0.5, 0.2, 0.1]).double(), rt.geometric(1.5, T), torch.ones(T).double()]


def test_terms_sum_to_the_gradient_and_its_truncations(pairs):
    terms = rt.distance_terms(pairs)
    for distance in range(T):
        expected = truncated(pairs, distance)
        assert torch.allclose(terms[: distance + 1].sum(0), expected, rtol=1e-12)
        assert torch.allclose(rt.loss_terms(pairs, distance).sum(0), expected, rtol=1e-12)
        # A loss gives nothing farther back than the distance.
        assert not rt.loss_terms(pairs, distance)[4, : 4 - distance].any()


@pytest.mark.parametrize("survival", SURVIVALS)
def test_randomised_truncation_by_enumeration(pairs, survival):
    terms, full = rt.distance_terms(pairs), pairs.sum(0)
    draws = [rt.randomised(terms, survival, r) for r in range(T)]
    chances = probabilities(survival)
    assert chances.sum() == pytest.approx(1)
    mean = sum(p * x for p, x in zip(chances, draws, strict=True))
    assert torch.allclose(mean, full, rtol=1e-12, atol=1e-14)
    variance = sum(p * (x - full).square().sum() for p, x in zip(chances, draws, strict=True)).item()
    assert rt.randomised_variance(rt.gram(terms), survival) == pytest.approx(variance, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_artbp_by_enumeration(pairs, keep):
    """Unbiased, and at the latents of the same squared error as a geometric distance of the same c."""
    full = pairs.sum(0)
    mean, variance = torch.zeros_like(full), 0.0
    for cuts in itertools.product([False, True], repeat=T - 1):
        chance = keep ** (T - 1 - sum(cuts)) * (1 - keep) ** sum(cuts)
        draw = rt.artbp(pairs, cuts, keep)
        mean += chance * draw
        variance += chance * (draw - full).square().sum().item()
    assert torch.allclose(mean, full, rtol=1e-12, atol=1e-14)
    survival = torch.tensor([keep**d for d in range(T)], dtype=torch.float64)
    assert rt.randomised_variance(rt.gram(rt.distance_terms(pairs)), survival) == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("count", range(1, T + 1))
def test_sampled_losses_by_enumeration(pairs, count):
    terms = rt.loss_terms(pairs, 1)
    own = terms.sum(0)
    draws = [T / count * terms[list(c)].sum(0) for c in itertools.combinations(range(T), count)]
    assert torch.allclose(torch.stack(draws).mean(0), own, rtol=1e-12, atol=1e-14)
    variance = torch.stack([(x - own).square().sum() for x in draws]).mean().item()
    assert rt.sampled_variance(rt.gram(terms), count) == pytest.approx(variance, rel=1e-10, abs=1e-12)


def test_geometric_has_the_mean_asked_for():
    for mean in (0.2, 1.0, 3.0):
        survival = rt.geometric(mean, T)
        assert survival[0] == 1
        assert survival[1:].sum().item() == pytest.approx(mean, rel=1e-9)
        assert torch.allclose(survival[1:] / survival[:-1], survival[1].expand(T - 1))
    assert torch.allclose(rt.geometric(T - 1, T), torch.ones(T, dtype=torch.float64))


def test_the_best_distribution_is_best(pairs):
    """No other distribution of the same mean has less variance, least of all a random small change of it."""
    generator = torch.Generator().manual_seed(1)
    for products in (rt.gram(rt.distance_terms(pairs)), rt.gram(torch.randn(T, 9, generator=generator).double())):
        for mean in (0.5, 1.0, 2.5):
            best = rt.best_survival(products, mean)
            assert best[0] == 1 and (best[1:] <= best[:-1] + 1e-12).all()
            assert best[1:].sum().item() == pytest.approx(mean, rel=1e-6)
            least = rt.randomised_variance(products, best)
            assert least <= rt.randomised_variance(products, rt.geometric(mean, T)) * (1 + 1e-9)
            for _ in range(200):
                change = 0.02 * torch.randn(T - 1, generator=generator, dtype=torch.float64)
                other = (best[1:] + change - change.mean()).clamp(1e-6, 1)
                if (other[1:] > other[:-1]).any() or abs(other.sum() - mean) > 1e-9:
                    continue
                other = torch.cat([best[:1], other])
                assert least <= rt.randomised_variance(products, other) + 1e-9


def test_bad_settings():
    for make in (lambda m: rt.geometric(m, T), lambda m: rt.best_survival(torch.eye(T).double(), m)):
        for mean in (0.0, T - 0.5):
            with pytest.raises(ValueError, match=f"above 0 and at most {T - 1}, got {mean}"):
                make(mean)
    with pytest.raises(ValueError, match=f"count must be between 1 and {T}, got 0"):
        rt.sampled_variance(torch.eye(T), 0)


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
