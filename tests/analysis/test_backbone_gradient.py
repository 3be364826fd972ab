"""The backbone's mean gradient: measures with known answers, unbiased limits, honest verdicts, and the whole script."""

import json
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from analysis.backbone import mean_gradient as mg
from analysis.backbone.claims import claims
from analysis.backbone.parameter_gradients import gradients as parameter_gradients
from analysis.backbone.restoration import Restoration
from analysis.backbone.task_settings import TaskSettings
from suite import cases
from suite.records import ROOT, read_record
from tests.models import build

pytestmark = pytest.mark.usefixtures("small_films")
TINY = TaskSettings(frames=9, size=16, width=32, layers=1, warm_up_steps=2, warm_up_clips=4)


def test_measures_with_known_answers():
    full = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    half = mg.compare(0.5 * full, full, [2, 2])
    assert half["normalised_mae"].item() == pytest.approx(0.5)
    assert half["relative_error"].item() == pytest.approx(0.5)
    assert half["cosine"].item() == pytest.approx(1)
    assert half["best_scaled_error"].item() == pytest.approx(0, abs=1e-3)  # magnitude only: nothing is left
    # Each tensor is off by another factor: one scale does not mend it, a scale for each does.
    mixed = mg.compare(full * torch.tensor([2.0, 2.0, 0.1, 0.1]), full, [2, 2])
    assert mixed["best_scaled_error"].item() > 0.5
    assert mixed["tensor_scaled_error"].item() == pytest.approx(0, abs=1e-3)
    # Perpendicular: no scale helps.
    wrong = mg.compare(torch.tensor([[2.0, 1.0, 0.0, 5.0]]), full, [2, 2])
    assert wrong["cosine"].item() == pytest.approx(0, abs=1e-7)
    assert wrong["best_scaled_error"].item() == wrong["tensor_scaled_error"].item() == pytest.approx(1)
    assert wrong["normalised_mae"].item() == pytest.approx((1 + 3 + 3 + 5) / 6)


def test_the_best_scale_is_best():
    generator = torch.Generator().manual_seed(0)
    full, chopped = torch.randn(2, 1, 30, generator=generator)
    measured = mg.compare(chopped, full, [10, 20])
    scales = torch.linspace(-3, 3, 2001)[:, None]
    least = ((scales * chopped - full).norm(dim=1) / full.norm()).min().item()
    assert measured["best_scaled_error"].item() == pytest.approx(least, rel=1e-3)
    assert measured["tensor_scaled_error"].item() <= measured["best_scaled_error"].item()


@pytest.mark.parametrize("kind", ["warmed", "own"])
def test_updates_are_those_of_torch_adam(kind):
    generator = torch.Generator().manual_seed(0)
    full, chopped = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    steps = {"warmed": torch.cat([full[:-1], chopped[-1:]]), "own": chopped}[kind]
    for sequence, got in zip((steps, full), mg.adam_updates(chopped, full)[kind], strict=True):
        weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1.0)
        for gradient in sequence:
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
        assert torch.allclose(before - weight.detach(), got[0], rtol=1e-9)


def test_limits_are_unbiased_by_enumeration():
    """Over all draws of three clips from a population of four, products of different clips average to the mean's."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    # Draws with replacement, each clip an independent draw: the weights 1, 1, 1 on three of them.
    values = []
    for i in range(4):
        for j in range(4):
            for k in range(4):
                rows = [i, j, k]
                values.append(mg.mean_products(a[rows], b[rows], torch.ones(1, 3)).item())
    assert np.mean(values) == pytest.approx((a.mean(0) @ b.mean(0)).item(), rel=1e-10)


def test_a_repeated_clip_never_meets_itself():
    """A bootstrap draw that holds a clip twice must not count its own noise: weights 2, 1, 1 by hand."""
    a = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = 2 * (2 * a[0] @ a[1] + 2 * a[0] @ a[2] + a[1] @ a[2])
    assert mg.mean_products(a, a, torch.tensor([[2.0, 1.0, 1.0]])).item() == pytest.approx(pairs.item() / 10)


def test_limits_tell_bias_from_noise():
    """A bias of a tenth of the mean gradient under noise ten times larger: the limit finds it."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, generator=generator)
    mean /= mean.norm()
    noise = lambda size: size * torch.randn(400, 2000, generator=generator) / 2000**0.5  # noqa: E731
    full = mean + noise(1.0)
    for scale, expected in ((0.9, 0.1), (1.0, 0.0)):
        error, cosine = mg.limits(full - (1 - scale) * mean + noise(1.0), full, torch.ones(1, 400))
        assert error.item() == pytest.approx(expected, abs=0.03)
        assert cosine.item() == pytest.approx(1.0, abs=0.01)
    lost, _ = mg.limits(noise(1.0), noise(1.0)[:4].repeat(100, 1) * 0 - 0, torch.ones(1, 400))
    assert lost.isnan()  # no mean gradient: undefined


def test_bootstrap_draws_whole_films():
    sources = ["a", "a", "a", "b", "c"]
    draws = mg.bootstrap_draws(sources, 400, 0)
    assert sorted(draws[0]) == [0, 1, 2, 3, 4]
    films = [{sources[k] for k in draw} for draw in draws[1:]]
    assert any(f == {"a"} for f in films) and any(f == {"b", "c"} for f in films)
    assert all(sum(sources[k] == "a" for k in draw) % 3 == 0 for draw in draws[1:])
    counts = mg.bootstrap_counts(sources, 10, 0)
    assert counts[0].tolist() == [1] * 5 and (counts.sum(1) >= 3).all()


def gradients(scale, wrong=0.0, noise=0.3, clips=16):
    """Clips whose truncated gradient is a multiple of the full one, plus a part of another direction."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    full = draw(1, 300) + noise * draw(clips, 300)
    other = draw(1, 300)
    truncated = {(1, d): scale * full + wrong * 0.9**d * other for d in (0, 1)}
    return mg.Gradients(truncated, full, [100, 200], [f"clip {k}" for k in range(clips)])


@pytest.mark.parametrize(
    ("scale", "wrong", "verdicts"),
    [
        (0.5, 0.0, ["holds", "holds", "holds", "holds", "fails"]),  # as the paper says: only the magnitude is wrong
        (1.0, 0.8, ["holds", "fails", "fails", "fails", "fails"]),  # only the direction is
        (0.99, 0.0, ["fails", "holds", "holds", "fails", "fails"]),  # next to nothing is
    ],
)
def test_verdicts_follow_the_numbers(scale, wrong, verdicts):
    metrics = mg.summarise(gradients(scale, wrong), 50, 0)
    got = [c.verdict for c in claims(metrics)]
    assert got[:3] == verdicts[:3] and got[4] == verdicts[4]
    if scale == 0.5:
        # Adam's update does not see a factor on all of its gradients at all.
        assert got[3] == "holds"
        assert metrics["rows"][0]["adam_own_normalised_mae"][0] < 1e-4
        assert metrics["rows"][0]["adam_warmed_normalised_mae"][0] > 0.02


def test_averaging_removes_noise_but_not_bias():
    g = gradients(1.0)
    generator = torch.Generator().manual_seed(9)
    noise = 0.5 * torch.randn(g.full.shape, generator=generator)
    noisy = mg.Gradients({(1, 0): g.full + noise, (1, 1): g.full + noise}, g.full, g.sizes, g.sources)
    assert claims(mg.summarise(noisy, 50, 0))[-1].verdict == "holds"
    by_clips = mg.summarise(noisy, 2, 0)["by_clips"]
    assert [r["clips"] for r in by_clips] == [1, 2, 4, 8, 16]
    errors = [r["1/0"]["relative_error"] for r in by_clips]
    assert errors[-1] == pytest.approx(errors[0] / 4, rel=0.2)  # 16 clips: a fourth of the noise
    # The noise of the full gradient's mean over n clips is 0.3 / sqrt(n) per parameter.
    assert by_clips[-1]["noise"] == pytest.approx(0.3 / 4, rel=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    return folder


def words(folder, out):
    task = {"vae": folder / "vae", "frames": 9, "size": 16, "width": 32, "layers": 1}
    task |= {"warm-up-steps": 2, "warm-up-clips": 4}
    options = [w for k, v in task.items() for w in (f"--task.{k}", str(v))]
    return [*options, "--count", "4", "--blocks", "1", "2", "--resamples", "20", "--out", str(out)]


def run(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "analysis" / "backbone_gradient.py"), *words])
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_the_script_measures(folder, tmp_path, monkeypatch, capsys):
    run(words(folder, tmp_path), monkeypatch)
    record = read_record(tmp_path / "backbone_gradient-generated-mse.json")
    assert str(folder) not in json.dumps(record.settings | record.provenance)
    assert (tmp_path / "backbone_gradient.png").stat().st_size > 10_000
    rows = {(r["block"], r["distance"]): r for r in record.metrics["rows"]}
    assert set(rows) == {(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)}  # the rest is exact
    assert all(low <= high for r in rows.values() for low, high in [r["normalised_mae"][1:]])
    assert len(record.metrics["claims"]) == 5
    assert "normalised MAE" in capsys.readouterr().out


def test_what_is_finished_is_kept_unless_something_changed(folder, tmp_path, monkeypatch):
    real = cases.provenance
    monkeypatch.setattr(cases, "provenance", lambda device="cpu": real(device) | {"commit": "a", "dirty": False})
    done = []
    one = lambda settings: cases.run_case(tmp_path / "x.json", settings, lambda: done.append(1) or {"n": len(done)})  # noqa: E731
    assert one({"s": 1}).metrics == one({"s": 1}).metrics == {"n": 1}
    assert one({"s": 2}).metrics == {"n": 2}
    monkeypatch.setattr(cases, "provenance", lambda device="cpu": real(device) | {"commit": "b", "dirty": False})
    assert one({"s": 2}).metrics == {"n": 3}
    monkeypatch.setattr(cases, "provenance", lambda device="cpu": real(device) | {"commit": "b", "dirty": True})
    assert one({"s": 2}).metrics == {"n": 4}
    assert one({"s": 2}).metrics == {"n": 5}  # code that differs from its commit is not told from other such code


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--cases", "nothing-mse"],
            "error: Unknown case 'nothing-mse': pass one of generated, training, held-out, early",
        ),
        (["--cases", "training-psnr"], "error: Unknown loss 'psnr'"),
        (["--count", "3"], "error: At least 4 clips"),
        (["--task.frames", "8"], "error: 8 frames fit no number of latents"),
    ],
)
def test_the_script_ends_in_one_sentence(folder, tmp_path, monkeypatch, more, sentence):
    with pytest.raises(SystemExit, match=sentence) as end:
        run([*words(folder, tmp_path), *more], monkeypatch)
    assert "\n" not in str(end.value)
    assert not list(tmp_path.iterdir())


def test_gradients_of_a_clip_do_not_depend_on_its_batch(folder, tmp_path):
    task = Restoration(TaskSettings(**{**TINY.__dict__, "vae": str(folder / "vae")}))
    backbone, samples = task.warmed_up("x", cache=tmp_path), task.samples(5, seed=0)
    all_at_once = parameter_gradients(task, backbone, samples, F.mse_loss, (1,))
    alone = parameter_gradients(task, backbone, samples[4:], F.mse_loss, (1,))
    together = parameter_gradients(task, backbone, samples[1:3], F.mse_loss, (1,))
    assert torch.allclose(all_at_once.full[4], alone.full[0], rtol=1e-3, atol=1e-7)
    assert torch.allclose(all_at_once.truncated[1, 0][1], together.truncated[1, 0][0], rtol=1e-3, atol=1e-7)


def test_what_the_decoder_draws_of_a_clip_leaves_no_floor(tmp_path):
    build("wan2.1", torch.float32).save_pretrained(tmp_path / "vae")
    task = Restoration(replace(TINY, vae=str(tmp_path / "vae")))
    films = task.samples(3, 0, [])
    drawn = task.drawn(films)
    assert drawn.clean.shape == films.clean.shape and torch.equal(drawn.latents, films.latents)
    decoded = task.vae.decode(task.decoder.denormalize(films.latents)).sample
    assert torch.allclose(drawn.clean, decoded, atol=1e-5)
    perfect = drawn.clean_as_condition()
    assert max(task.pixel_loss(None, perfect)) < 1e-9 < min(task.pixel_loss(None, films.clean_as_condition()))
