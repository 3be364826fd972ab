"""Every end task: seeded, in range, what its mask says, and refused in one sentence when it cannot be."""

from dataclasses import replace

import pytest
import torch

from bench.tasks import TASKS, task_by_name
from bench.tasks.__main__ import cli
from bench.tasks.training.arms import ARMS
from suite.motion import moving_clip

SIZE = (5, 24, 32)
QUICK = {"artifact-removal": {"every": 4, "splats_per_view": 200, "steps_per_view": 4, "cache": None}}


@pytest.fixture(params=TASKS)
def task(request):
    return replace(TASKS[request.param], **QUICK.get(request.param, {}))


def test_shapes_range_and_types(task):
    pair = task.clip(3, *SIZE)
    for video in (pair.condition, pair.target):
        assert (video.shape, video.dtype) == ((3, *SIZE), torch.float32)
        assert not video.requires_grad and video.isfinite().all()
        assert video.min() >= -1 and video.max() <= 1
    assert pair.target.std() > 0.05  # something is to be seen
    assert not torch.equal(pair.condition, pair.target)


def test_a_seed_is_a_clip_whatever_happened_before(task):
    first = task.clip(3, *SIZE)
    torch.manual_seed(99)
    moving_clip(torch.Generator().manual_seed(5), *SIZE)
    again, other = task.clip(3, *SIZE), task.clip(4, *SIZE)
    assert torch.equal(first.condition, again.condition) and torch.equal(first.target, again.target)
    assert not torch.equal(first.target, other.target)
    assert first.source == again.source != other.source


def test_outside_the_mask_nothing_differs(task):
    for seed in range(3):
        pair = task.clip(seed, *SIZE)
        if pair.mask is None:
            assert task.name in ("super-resolution", "artifact-removal", "deblurring")
            return
        assert pair.mask.shape == (1, *SIZE)
        assert set(pair.mask.unique().tolist()) == {0.0, 1.0}
        differs = (pair.condition != pair.target).any(0, keepdim=True)
        assert not (differs & (pair.mask == 0)).any()
        assert differs[pair.mask > 0].float().mean() > 0.6  # and inside it most does


@pytest.mark.parametrize("size", [(1, 16, 16), (2, 17, 31)])
def test_odd_and_small_sizes(task, size):
    assert task.clip(0, *size).condition.shape == (3, *size)


def test_the_losses_are_those_of_the_paper():
    terms = {name: (task.weight("pixel"), task.weight("latent")) for name, task in TASKS.items()}
    assert terms["super-resolution"] == ({"mse": 1.0, "dists": 0.1}, {})
    assert terms["artifact-removal"] == ({"lpips": 1.0}, {"mse": 1.0})
    assert terms["inpainting"] == terms["inpainting-objects"] == ({"lpips": 1.0}, {"mse": 1.0})
    assert terms["driving"] == ({"mse": 1.0}, {})
    assert [name for name, task in TASKS.items() if task.trains_decoder] == ["driving"]


@pytest.mark.parametrize("arguments", [(-1, 5, 32, 32), (0, 0, 32, 32), (0, 5, 15, 32), (0, 5, 32, 8)])
def test_sizes_that_make_no_clip(task, arguments):
    with pytest.raises(ValueError, match=r"needs a seed of at least 0, at least 1 frame, and at least 16 pixels"):
        task.clip(*arguments)


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        ("super-resolution", {"scale": 0}, "scale must be a whole number of at least 1, got 0"),
        ("inpainting", {"region": "left"}, "region must be 'centre' or 'object', got 'left'"),
        ("artifact-removal", {"every": 0}, "every, splats_per_view and steps_per_view must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(name, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TASKS[name], **setting).clip(0, *SIZE)


def test_an_unknown_task_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown task 'sr': pass one of super-resolution, artifact-removal,"):
        task_by_name("sr")


def test_preview_writes_a_sheet(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    words = ["--task", "inpainting", "--seeds", "0", "1", "--frames", "3", "--size", "16", "24"]
    cli(["preview", *words, "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_list_names_tasks_losses_and_arms(capsys):
    cli(["list"])
    lines = capsys.readouterr().out.splitlines()
    heading = "Gradients of the pixel loss (--gradient of train), which run compares as arms:"
    assert lines[len(TASKS) : len(TASKS) + 2] == ["", heading]
    assert [line.partition(":")[0] for line in lines[len(TASKS) + 2 :]] == list(ARMS)
    assert "super-resolution: 1 mse (pixel) + 0.1 dists (pixel)" in lines
    assert "driving: 1 mse (pixel); the decoder trains too" in lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "nonsense", "--out", "a.png"], "Unknown task 'nonsense'"),
        (["--task", "driving", "--out", "a.txt"], "--out must name a .png file, got 'a.txt'"),
        (["--task", "inpainting", "--out", "a.png", "--folder", "nowhere"], "must be a folder of videos"),
        (["--task", "inpainting", "--out", "a.png", "--shown", "0"], "--shown of at least 1"),
    ],
)
def test_preview_refuses_in_one_sentence(words, sentence):
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        cli(["preview", *words])
