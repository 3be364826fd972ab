"""The protocol of the end tasks, and what its report says about known records."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

import bench.tasks.protocol as protocol_module
from bench.tasks import evaluate
from bench.tasks.__main__ import cli
from bench.tasks.comparison import LITTLE, TaskResults, better, claims, distance_matters, pixels_win, results_of
from bench.tasks.protocol import COMPARED, SMALL_ARMS, TASK_NAMES, Protocol, code_fingerprint, run
from bench.tasks.publish import publish
from bench.tasks.tables import controls, overview, table, verdicts
from suite.metrics import METRICS, score_videos
from suite.records import provenance, write_record

SETTINGS = {
    "task": "inpainting", "frames": 25, "size": [32, 32], "clips": 8, "test_clips": 4, "steps": 3, "batch": 2,
    "rate": 1e-3, "mixed_precision": "bf16", "perceptual_stride": 4, "vae": "wan2.1",
}  # fmt: skip


def record(folder: Path, arm: str, seed: int | None, psnr: list[float], lpips: list[float]) -> None:
    per_clip = {name: [0.5] * len(psnr) for name in METRICS} | {"psnr": psnr, "lpips-vgg": lpips, "dists": None}
    fvd = None if seed in (3, 4) else 1000 - 10 * psnr[0]
    metrics = {
        "per_clip": per_clip, "fvd": fvd, "fvd_split_half_noise": 400.0,
        "missing": {"dists": "install it"}, "losses": [],
    }  # fmt: skip
    name = f"inpainting-{arm}" + ("" if seed is None else f"-seed{seed}")
    write_record(folder / f"{name}.json", SETTINGS | {"arm": arm, "seed": seed}, metrics, provenance())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pixel losses win by 1 dB whatever the clip, lose 0.1 of LPIPS, and D = 0 lies 0.5 dB below the exact gradient."""
    for seed in range(5):
        clips = [20.0 + seed + k for k in range(4)]
        record(tmp_path, "latent", seed, clips, [0.3] * 4)
        record(tmp_path, "exact", seed, [x + 1 for x in clips], [0.4] * 4)
        record(tmp_path, "chop-0", seed, [x + 0.5 for x in clips], [0.4] * 4)
        record(tmp_path, "chop-1", seed, [x + 1 for x in clips], [0.4 - 0.02 * (k - 1.5) for k in range(4)])
        record(tmp_path, "chop-4", seed, [x + 1 for x in clips], [0.4] * 4)
        record(tmp_path, "warm-up", seed, [x - 1 for x in clips], [0.3] * 4)
    record(tmp_path, "input", None, [18.0] * 4, [0.5] * 4)
    cost = {"step_seconds": {"latent": [0.1, 0.2], "exact": [1.0, 2.0], "full": [0.9, 1.8]},
            "peak_bytes": {"latent": 2**20, "exact": 5 * 2**20, "full": 9 * 2**20}}  # fmt: skip
    settings = SETTINGS | {"arm": None, "arms": ["latent", "exact", "full"], "rounds": 2}
    write_record(tmp_path / "inpainting-cost.json", settings, cost, provenance())
    (tmp_path / "half.json").write_text("{")
    return tmp_path


@pytest.fixture
def results(folder) -> TaskResults:
    with pytest.warns(UserWarning, match="half.json"):
        (found,) = results_of(folder)
    return found


def test_differences_are_paired_by_seed_and_clip(results):
    mean, low, high = results.difference("exact", "psnr")
    assert (mean, low, high) == pytest.approx((1.0, 1.0, 1.0))  # although seeds and clips differ by up to 7 dB
    assert results.difference("chop-0", "psnr", "exact") == pytest.approx((-0.5, -0.5, -0.5))
    assert results.difference("exact", "dists") is None
    assert results.mean("latent", "psnr") == pytest.approx(23.5)
    assert results.fvds("latent") == {0: 800, 1: 790, 2: 780}  # the other seeds have none
    assert results.fvd_difference("exact") == pytest.approx((-10, -10, -10))
    assert results.fvd_difference("input") is None


def test_verdicts_follow_the_direction_of_the_metric(results):
    assert pixels_win(results, "exact", "psnr") == "holds"
    assert pixels_win(results, "exact", "lpips-vgg") == "fails"
    assert pixels_win(results, "exact", "ssim") == "undecided"
    assert better("psnr", (1.0, 0.5, 1.5)) is True
    assert better("lpips-vgg", (1.0, 0.5, 1.5)) is False
    assert better("lpips-vgg", (0.1, -0.5, 0.5)) is None
    assert dict(distance_matters(results, "psnr")) == {
        "chop-0": pytest.approx((-0.5, -0.5, -0.5)),
        "chop-1": pytest.approx((0, 0, 0)),
    }
    lines = verdicts(results)
    assert "better: PSNR." in lines[0]
    assert "worse: LPIPS (VGG)." in lines[1]
    assert "of a truncated arm with the exact gradient, 1 are worse and 0 better" in lines[-4]
    assert lines[-3].endswith("are not counted: ChopGrad D = 4.")
    assert lines[-2].endswith("ChopGrad D = 0 50 to 50 %, ChopGrad D = 1 100 to 100 %.")
    assert lines[-1].endswith("at least 90 % of the exact gradient's gain*: holds in 1 of the 1 metrics that it wins.")


def test_the_claims_of_the_paper_are_judged_metric_by_metric(results):
    found = {c.statement: c for c in claims(results)}
    assert {c.source for c in found.values()} == {"Table 3"}
    wins = {s.split(" in ")[1]: c.verdict for s, c in found.items() if s.startswith("A loss on pixels")}
    assert wins.pop("PSNR (inpainting).") == "holds" and wins.pop("LPIPS (VGG) (inpainting).") == "fails"
    assert set(wins.values()) == {"undecided"} and len(wins) == 4  # DISTS was not scored
    kept = [(s, c.verdict, c.evidence) for s, c in found.items() if s.startswith(LITTLE)]
    assert kept == [(f"{LITTLE} in PSNR (inpainting).", "holds", "D = 1 keeps 100 %")]


@pytest.mark.parametrize(
    ("gains", "verdict", "share"), [([0.5] * 4, "fails", 50), ([0, 2, 0, 2], "undecided", 100), (None, None, None)]
)
def test_whether_the_distance_matters_is_decided_by_the_interval(folder, gains, verdict, share):
    for seed in range(5):
        if gains is None:
            (folder / f"inpainting-chop-1-seed{seed}.json").unlink()
        else:
            record(folder, "chop-1", seed, [20.0 + seed + k + g for k, g in enumerate(gains)], [0.4] * 4)
    with pytest.warns(UserWarning, match="half.json"):
        (results,) = results_of(folder)
    kept = [(c.verdict, c.evidence) for c in claims(results) if c.statement.startswith(LITTLE)]
    assert kept == ([(verdict, f"D = 1 keeps {share} %")] if gains else [])


def test_time_is_a_ratio_within_its_round_and_memory_is_in_mib(results):
    assert results.relative_time("latent") == pytest.approx((0.1, 0.1, 0.1))
    assert results.relative_time("full") == pytest.approx((0.9, 0.9, 0.9))
    assert results.peak_mib("full") == 9


def test_the_table_marks_wins_and_losses_and_says_what_is_missing(results):
    text = table(results)
    assert "**1.00 [1.00, 1.00]**" in text
    assert "_0.100 [0.100, 0.100]_" in text
    assert "dists is n/a: install it" in text
    assert "FVD between two halves of the targets: 400. It was computed for 3 of the seeds." in text
    assert "-10 [-10, -10]" in text
    assert "5 seeds, 4 test clips of 25 frames of 32x32" in text
    assert "| full back-propagation" in text
    assert "tox -e tasks" in overview([results], "tox -e tasks")


def test_the_committed_protocol_is_the_one_of_the_paper():
    full, small = Protocol(full=True), Protocol()
    assert full.tasks == TASK_NAMES
    assert full.arms == COMPARED
    assert full.seeds >= 5
    arms = {"latent", "isolated", "first", "chop-0", "chop-1", "chop-2", "chop-4", "block-4", "exact"}
    assert arms | {"latent-tuned", "exact-frozen"} == set(COMPARED)
    assert set(full.arms_of("inpainting")) == arms and full.arms_of("driving") == list(COMPARED)
    assert len(small.tasks) == 1
    assert small.arms == SMALL_ARMS
    assert full.training("super-resolution", "exact", 0, Path("runs"), None).vae == "cogvideox"
    first, second = (full.training("driving", arm, 3, Path("runs"), Path("w")) for arm in ("latent", "exact"))
    assert dataclasses.replace(first, arm="exact", out=second.out) == second  # same data, order, budget


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ("exact",)}, "compared with 'latent', which --arms lacks"),
        ({"arms": ("latent", "half")}, "Unknown arm or gradient 'half'"),
        ({"test_clips": 2}, "four test clips are needed"),
        ({"tasks": ("sorting",)}, "Unknown task 'sorting'"),
        ({"frames": 18}, "18 frames fit no number of latents"),
    ],
)
def test_a_protocol_that_cannot_work_fails_before_training(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(Protocol(out=tmp_path, cpu=True, **changes))
    assert not list(tmp_path.iterdir())


def test_a_small_comparison_runs_is_kept_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol_module, "ROOT", tmp_path)  # trained models and clips
    monkeypatch.setattr("bench.tasks.publish.ROOT", tmp_path)
    key = code_fingerprint()
    monkeypatch.setattr(protocol_module, "code_fingerprint", lambda: key)
    some = lambda x, y: dict.fromkeys(METRICS) | score_videos(x, y, ["psnr", "lpips-alex"])  # noqa: E731
    monkeypatch.setattr(evaluate, "score_videos", some)  # what each metric says is tested beside it
    settings = Protocol(
        tasks=("driving",), arms=("latent", "chop-1"), seeds=1, frames=9, size=(32, 32), clips=8, test_clips=4,
        warm_up=2, steps=1, fvd_seeds=0, cpu=True, out=tmp_path / "records", mixed_precision="no",
    )  # fmt: skip
    first = run(settings)
    assert {r.settings["arm"] for r in first} == {"input", "autoencoder", "warm-up", "latent", "chop-1", None}
    chop = next(r for r in first if r.settings["arm"] == "chop-1")
    assert len(chop.metrics["per_clip"]["psnr"]) == 4
    assert chop.metrics["fvd"] is None
    assert len(chop.metrics["losses"]) == 1
    cost = first[-1].metrics
    assert cost["peak_bytes"]["latent"] < cost["peak_bytes"]["chop-1"]
    written = {p: os.stat(p).st_mtime_ns for p in settings.out.glob("*.json")}
    monkeypatch.setattr(protocol_module.Training, "run", lambda self: pytest.fail("trained again"))
    again = run(settings)
    assert [r.metrics for r in again] == [r.metrics for r in first]
    assert written == {p: os.stat(p).st_mtime_ns for p in settings.out.glob("*.json")}
    publish(settings)
    for name in ("driving.md", "driving.png", "differences.png", "README.md"):
        assert (settings.out / name).stat().st_size > 200
    record = json.loads((settings.out / "driving-chop-1-seed0.json").read_text())
    assert record["settings"]["task"] == "driving"
    assert record["settings"]["arm"] == "chop-1"
    assert record["settings"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(record)


def test_the_command_line_tells_bad_input_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: Unknown arm or gradient 'half': pass one of latent"):
        cli(["train", "--task", "driving", "--gradient", "half", "--out", str(tmp_path / "x"), "--cpu"])
    cli(["list"])
    assert "chop-1: ChopGrad D = 1" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def one_thread(fresh_accelerate):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_controls_say_whose_the_gain_is(tmp_path):
    for arm, psnr in (("latent", 20.0), ("latent-tuned", 21.0), ("exact-frozen", 20.0), ("exact", 20.5)):
        for seed in range(2):
            record(tmp_path, arm, seed, [psnr + 0.01 * k for k in range(4)], [0.3] * 4)
    (results,) = results_of(tmp_path)
    page = controls(results)
    assert "PSNR: the exact gradient is worse than the tuned decoder (-0.50 [-0.50, -0.50])." in page
    assert "| latent MSE, decoder tuned on targets |" in page and "**1.00 [1.00, 1.00]**" in page
