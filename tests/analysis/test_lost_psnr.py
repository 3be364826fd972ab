"""Verdicts on why PSNR is lost, from records with known differences."""

from dataclasses import replace

import pytest

from analysis.lost_psnr import Config, main, of_variants, report, table, variant, verdict
from bench.tasks import TASKS, LossTerm
from bench.tasks.comparison import TaskResults
from suite.metrics import METRICS
from suite.records import provenance, read_records, write_record


@pytest.fixture(autouse=True)
def known_tasks():
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def results(folder, task, gain):
    """The exact gradient differs from latent-only by ``gain`` dB, some clips more and some less."""
    for seed in range(5):
        for arm, shift in (("latent", 0.0), ("exact", gain), ("chop-1", gain)):
            psnr = [20.0 + k + shift * (1 + 0.1 * (k - 1.5)) for k in range(4)]
            per_clip = {name: [0.5] * 4 for name in METRICS} | {"psnr": psnr}
            settings = {"task": task, "arm": arm, "seed": seed}
            write_record(folder / f"{task}-{arm}-seed{seed}.json", settings, {"per_clip": per_clip}, provenance())
    return TaskResults(task, [r for r in read_records(folder) if r.settings["task"] == task])


@pytest.mark.parametrize(
    ("mse", "lpips", "sentence"),
    [
        (0.3, -0.2, "MSE through the same decoder wins PSNR, LPIPS loses it"),
        (-0.3, -0.2, "LPIPS is not what costs it"),
        (0.3, 0.2, "LPIPS does not lose it either"),
    ],
)
def test_the_verdict_follows_both_intervals(tmp_path, mse, lpips, sentence):
    ours, theirs = results(tmp_path / "a", "inpainting-mse", mse), results(tmp_path / "b", "inpainting", lpips)
    assert sentence in verdict("inpainting", ours, theirs)
    assert f"MSE {mse:.3f} [" in verdict("inpainting", ours, theirs)
    assert "was not measured" in verdict("inpainting", ours, None)


def test_the_table_has_both_losses(tmp_path):
    results(tmp_path, "inpainting-mse", 0.3)
    assert list(of_variants(tmp_path, ("artifact-removal", "inpainting"))) == ["inpainting"]
    results(tmp_path / "both", "artifact-removal-mse", 0.1)
    results(tmp_path / "both", "inpainting-mse", 0.3)
    both = ("artifact-removal", "inpainting")
    assert tuple(of_variants(tmp_path / "both", both)) == both
    found = of_variants(tmp_path, ("inpainting",))
    lines = table(found, {}).splitlines()
    assert len(lines) == 2 + 4 and lines[2].count("n/a") == 3 and "0.300 [" in lines[5]
    assert "Why is PSNR lost?" in report(tmp_path, ("inpainting",), full=False)


def test_a_variant_differs_in_its_loss_on_pixels_only():
    name = variant("artifact-removal")
    assert TASKS[name].losses == (LossTerm("mse", "latent"), LossTerm("mse", "pixel"))
    old = TASKS["artifact-removal"]
    assert replace(TASKS[name], name=old.name, losses=old.losses) == old


@pytest.mark.parametrize("task", ["driving", "nonsense"])
def test_other_tasks_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match=rf"takes tasks with LPIPS on pixels \(artifact-removal, .*\), got '{task}'"):
        main(Config(tasks=(task,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
