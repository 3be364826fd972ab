"""Training along truncated gradients: the toy against brute force and theory, and the end task's bookkeeping."""

import runpy
import sys

import pytest
import torch

from analysis.training import biased_descent as bd
from analysis.training.gaps import DISTANCES, end_claims, gaps
from analysis.training.toy import toy_claims
from suite.records import ROOT, read_record
from tests.models import build


def recurrence(task, seed, clip, theta, distance):
    """The loss gradient by autograd through the recurrence's own matrix, cut group by group."""
    theta = theta.clone().requires_grad_()
    z = (task.latents[seed, clip] @ theta).unflatten(0, (bd.GROUPS, bd.LATENT))
    total = 0.0
    for i in range(bd.GROUPS):
        x = 0.0
        for j in range(i + 1):
            latent = z[j] if i - j <= distance else z[j].detach()  # the forward pass is untouched
            x = x + task.decoder[seed, i, :, j] @ latent
        target = task.target[seed, clip].unflatten(0, (bd.GROUPS, bd.PIXELS))[i]
        total = total + 0.5 * (x - target).square().sum()
    (gradient,) = torch.autograd.grad(total, theta)
    return total.item(), gradient


def test_the_toy_is_the_recurrence_that_it_says():
    task = bd.LinearTask.draw(2, 0.7, 0.5)
    # Influence decays by the decay per group: the singular values of A^d are decay^d.
    norms = [torch.linalg.matrix_norm(task.decoder[0, d, :, 0], ord=2).item() for d in range(bd.GROUPS)]
    assert norms[11] / norms[1] == pytest.approx(0.7**10, rel=0.9)
    for d in range(1, bd.GROUPS):
        assert torch.allclose(task.decoder[0, d, :, 0], task.decoder[0, d + 0, :, 0])
    assert torch.allclose(task.decoder[:, 5, :, 2], task.decoder[:, 3, :, 0])  # only i - j matters
    assert not task.decoder[:, 2, :, 3].any()  # causal


@pytest.mark.parametrize("distance", [0, 2, bd.GROUPS - 1])
def test_one_step_of_descent_is_a_step_along_the_truncated_gradient(distance):
    task = bd.LinearTask.draw(2, 0.7, 0.5)
    result = bd.descend(task, distance, 1)
    for seed in range(2):
        x = task.inputs[seed]
        hessian = torch.einsum("knp,knq->pq", x, x) / bd.CLIPS
        rate = 1 / torch.linalg.eigvalsh(hessian)[-1]
        theta = torch.zeros(bd.PARAMETERS, dtype=torch.float64)
        gradient = sum(recurrence(task, seed, k, theta, distance)[1] for k in range(bd.CLIPS)) / bd.CLIPS
        loss = lambda t, seed=seed: sum(recurrence(task, seed, k, t, 0)[0] for k in range(bd.CLIPS)) / bd.CLIPS  # noqa: E731
        fell = loss(theta) - loss(theta - rate * gradient)
        assert (result.descent[0] - result.descent[1])[seed].item() == pytest.approx(fell, rel=1e-9)


def test_the_gap_is_where_the_truncated_gradient_vanishes():
    task = bd.LinearTask.draw(2, 0.6, 1.0)
    result = bd.descend(task, 1, 4000)
    cut = task.truncated_inputs(1)
    for seed in range(2):
        left = torch.einsum("knp,knq->pq", cut[seed], task.inputs[seed])
        theta = torch.linalg.solve(left, torch.einsum("knp,kn->p", cut[seed], task.target[seed]))
        gradients = sum(recurrence(task, seed, k, theta, 1)[1] for k in range(bd.CLIPS))
        assert gradients.abs().max() < 1e-9
        best = torch.linalg.lstsq(task.inputs[seed].flatten(0, 1), task.target[seed].flatten()[:, None]).solution[:, 0]
        loss = lambda t, seed=seed: sum(recurrence(task, seed, k, t, 0)[0] for k in range(bd.CLIPS)) / bd.CLIPS  # noqa: E731
        gap = loss(theta) - loss(best)
        assert result.gap[seed].item() == pytest.approx(gap, rel=1e-7)
        assert result.start[seed].item() == pytest.approx(loss(torch.zeros_like(theta)) - loss(best), rel=1e-9)
        assert gap > 1e-3 * result.start[seed].item() * 0.1
    assert torch.allclose(result.descent[-1], result.gap, rtol=1e-6)
    assert torch.allclose(result.adam[-1], result.gap, rtol=1e-3)  # rescaling does not move the end


@pytest.mark.parametrize("decay", [0.3, 0.9])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_theory_holds_on_the_toy(decay, noise):
    task = bd.LinearTask.draw(8, decay, noise)
    previous = torch.full((8,), torch.inf, dtype=torch.float64)
    for distance in (0, 1, 4, bd.GROUPS - 1):
        result = bd.descend(task, distance, 2000)
        assert (result.relative_bias < 1).all() and result.converges.all()
        assert (result.relative_bias <= previous).all()
        previous = result.relative_bias
        if noise == 0:
            powers = torch.arange(2001)[:, None]
            assert (result.descent <= result.rate**powers * result.start * (1 + 1e-9) + 1e-12).all()
            assert (result.descent[-1] < 1e-9 * result.start).all()
        else:
            assert (result.descent[-1] <= result.bound * (1 + 1e-9) + 1e-12).all()
    assert (result.relative_bias < 1e-9).all()
    assert (result.gap < 1e-20).all()


@pytest.mark.parametrize("settings", [(0, 0.5, 1), (2, 1.0, 1), (2, 0.5, -1)])
def test_bad_toys(settings):
    with pytest.raises(ValueError, match="Pass a seed or more, a decay between 0 and 1 and noise of at least 0"):
        bd.LinearTask.draw(*settings)


def runs(progress, seeds=4):
    """Made-up runs: for each distance the progress of every seed, on top of seeds that differ a lot."""
    made = {}
    for seed in range(seeds):
        for d in DISTANCES:
            start, gained = 1 + 0.5 * seed, progress[d] * (1 + 0.05 * seed)
            fresh = {"0": start, "10": start - gained}
            made[seed, d] = {"training_mse": [start] * 8 + [start - gained] * 2, "fresh_mse": fresh}
    return made


def test_gaps_are_paired_by_seed():
    progress = {0: 0.2, 1: 0.38, 2: 0.39, 4: 0.4, None: 0.4}
    rows = {r["distance"]: r for r in gaps(runs(progress), 4)}
    # Seeds differ by 1.5 in level; the pairing leaves only the spread of the gap itself.
    assert rows[0]["final_fresh_gap"][0] == pytest.approx(0.2 * 1.075)
    assert rows[0]["final_fresh_gap"][2] - rows[0]["final_fresh_gap"][1] < 0.05
    assert rows[0]["progress_share"][0] == pytest.approx(0.5)
    assert rows[1]["progress_share"] == pytest.approx([0.95] * 3)
    assert rows[None]["final_fresh_gap"] == [0, 0, 0]
    assert rows[0]["final_training_gap"][0] == pytest.approx(0.2 * 1.075)


@pytest.mark.parametrize(
    ("share", "bias", "verdicts"),
    [
        (0.95, 0.1, ["holds", "holds"]),
        (0.5, 0.1, ["fails", "fails"]),
        (0.5, 0.7, ["fails", "holds"]),
    ],
)
def test_verdicts_follow_the_numbers(share, bias, verdicts):
    progress = {0: 0.4 * share, 1: 0.4 * share, 2: 0.4, 4: 0.4, None: 0.4}
    rows = gaps(runs(progress), 4)
    for row in rows:
        row["squared_relative_bias"] = [bias] * 3
    assert [c.verdict for c in end_claims(rows)] == verdicts


def test_no_progress_gives_no_verdict():
    rows = gaps(runs(dict.fromkeys(DISTANCES, 0.0)), 4)
    for row in rows:
        row["squared_relative_bias"] = [0.1] * 3
    assert all(row["progress_share"] is None for row in rows)
    assert [c.verdict for c in end_claims(rows)] == ["undecided", "undecided"]


@pytest.mark.parametrize(("gap", "verdict"), [(1e-12, "holds"), (1e-3, "fails")])
def test_verdicts_on_the_toy_without_noise(gap, verdict):
    row = {"distance": 1, "relative_bias": [0.5], "descent_gaps": [gap], "relative_gap": [0, 0, 0], "within_rate": 1}
    (claim,) = toy_claims([row], 0.6, 0.0)
    assert claim.verdict == verdict


def test_verdicts_on_the_toy_with_noise():
    row = {"distance": 1, "relative_bias": [0.5, 1.5], "descent_gaps": [0.1, 0.1], "relative_gap": [0.1, 0.1, 0.1]}
    row |= {"relative_gaps": [0.1, 0.1], "adam_gaps": [0.1, 0.1], "relative_bound": [0.2, None]}
    assert [c.verdict for c in toy_claims([row], 0.6, 1.0)] == ["holds", "fails"]
    row |= {"adam_gaps": [0.01, 0.01], "relative_bound": [0.05, None]}
    assert [c.verdict for c in toy_claims([row], 0.6, 1.0)] == ["fails", "holds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_films):
    folder = tmp_path_factory.mktemp("training")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    return folder


def script(folder, out, monkeypatch, *more):
    task = {"vae": folder / "vae", "frames": 13, "size": 16, "width": 32, "layers": 1}
    task |= {"warm-up-steps": 2, "warm-up-clips": 4}
    words = [w for k, v in task.items() for w in (f"--task.{k}", str(v))]
    words += ["--seeds", "2", "--steps", "2", "--toy-seeds", "2", "--toy-steps", "50", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "analysis" / "training_bias.py"), *words])
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_the_script_trains(folder, tmp_path, monkeypatch, capsys):
    script(folder, tmp_path, monkeypatch)
    assert "share of exact's progress" in capsys.readouterr().out
    assert len(list(tmp_path.glob("training_bias-toy-*.json"))) == 6
    made = {p.stem: read_record(p).metrics for p in (tmp_path / "training_bias").glob("*.json")}
    assert set(made) == {f"seed{s}-{d}" for s in (0, 1) for d in ("d0", "d1", "d2", "d4", "exact")}
    for seed in (0, 1):
        # All strategies see the same clips, and values do not depend on the strategy: the first loss is the same.
        first = {m["training_mse"][0] for name, m in made.items() if name.startswith(f"seed{seed}")}
        assert max(first) - min(first) < 1e-6
        second = [made[f"seed{seed}-{d}"]["training_mse"][1] for d in ("d0", "d1", "exact")]
        assert len(set(second)) == 3  # but they go different ways
    assert made["seed0-exact"]["training_mse"] != made["seed1-exact"]["training_mse"]
    end = read_record(tmp_path / "training_bias-end_task.json")
    assert len(end.metrics["claims"]) == 2
    assert (tmp_path / "training_bias.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--steps", "-1"], "error: Seeds, steps and batch must be at least 1"),
        (["--task.frames", "9"], "error: 9 frames are 5 frame groups, so D = 4 would be exact"),
        (["--decays", "1.5"], "error: Pass a seed or more, a decay between 0 and 1"),
    ],
)
def test_the_script_ends_in_one_sentence(folder, tmp_path, monkeypatch, more, sentence):
    with pytest.raises(SystemExit, match=sentence) as end:
        script(folder, tmp_path, monkeypatch, *more)
    assert "\n" not in str(end.value)
