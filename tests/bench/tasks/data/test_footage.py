"""Real footage: stretches of films, and equal crops of paired films."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from bench.tasks import TASKS, task_by_name
from bench.tasks.data.footage import film_clip, find_pairs, paired_clip


def film(path, frames=12, height=40, width=56, add=0):
    """Lossless; frame k has one grey level plus a ramp to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for k in range(frames):
            picture = np.full((height, width, 3), 10 * k + add, np.uint8) + np.arange(width, dtype=np.uint8)[:, None]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_stretches_are_whole_and_seeded(tmp_path):
    film(tmp_path / "a.mkv")
    film(tmp_path / "b.mkv", add=50)
    sources, starts = set(), set()
    for seed in range(12):
        clip, source = film_clip(tmp_path, generator(seed), 5, 24, 24)
        assert torch.equal(clip, film_clip(tmp_path, generator(seed), 5, 24, 24)[0])
        step = (clip[:, 1:] - clip[:, :-1]).mean((0, 2, 3)) * 127.5
        assert step.tolist() == pytest.approx([10] * 4, abs=0.5)  # frames in order, none left out
        sources.add(source)
        starts.add(round((clip[0, 0].mean().item() + 1) * 12.75 / 5))
    assert sources == {"a.mkv", "b.mkv"} and len(starts) > 2


@pytest.mark.parametrize("name", ["super-resolution", "inpainting", "inpainting-objects"])
def test_tasks_on_a_folder_of_films(tmp_path, name):
    film(tmp_path / "a.mkv")
    pair = task_by_name(name, tmp_path).clip(1, 5, 24, 32)
    assert pair.source == "a.mkv" and pair.target.shape == (3, 5, 24, 32)
    with pytest.raises(ValueError, match=r"'a.mkv' has 12 frames, but 13 are needed: pass fewer frames or a"):
        task_by_name(name, tmp_path).clip(1, 13, 24, 32)


@pytest.mark.filterwarnings("ignore:left out")
def test_films_that_cannot_be_used_are_passed_by(tmp_path):
    alone = film(tmp_path / "alone" / "b.mkv")
    film(tmp_path / "all" / "b.mkv")
    film(tmp_path / "all" / "short.mkv", frames=3)
    (tmp_path / "all" / "broken.mkv").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="left out: ") as told:
        found = [film_clip(tmp_path / "all", generator(seed), 12, 24, 24) for seed in range(8)]
    assert {source for _, source in found} == {alone.name}
    assert {str(w.message).split("'")[1] for w in told} == {"broken.mkv", "short.mkv"}
    again = [film_clip(tmp_path / "all", generator(seed), 12, 24, 24)[0] for seed in (5, 2)]
    assert torch.equal(again[0], found[5][0]) and torch.equal(again[1], found[2][0])
    alone.unlink()
    for name in "xyz":
        film(alone.with_name(f"{name}.mkv"), frames=4)
    with pytest.raises(ValueError, match=r"None of the 3 videos can be used, the first because '..mkv' has 4 frames"):
        film_clip(tmp_path / "alone", generator(), 5, 24, 24)


def test_pairs_that_cannot_be_used_are_passed_by(tmp_path):
    for side in ("condition", "target"):
        film(tmp_path / side / "x.mkv")
        film(tmp_path / side / "y.mkv", frames=12 if side == "target" else 11)
    with pytest.warns(UserWarning, match=r"left out: 'y.mkv' has 11 frames in condition/ and 12 in target/"):
        assert {paired_clip(tmp_path, generator(seed), 4, 24, 24)[2] for seed in range(6)} == {"x.mkv"}


@pytest.mark.parametrize("name", ["artifact-removal", "driving"])
def test_tasks_on_paired_folders(tmp_path, name):
    film(tmp_path / "condition" / "x.mkv")
    film(tmp_path / "target" / "x.mkv", add=30)
    for seed in range(4):
        pair = task_by_name(name, tmp_path).clip(seed, 4, 24, 24)
        # The same stretch and the same crop of both: the difference is 30 steps everywhere.
        torch.testing.assert_close(pair.target - pair.condition, torch.full((3, 4, 24, 24), 30 / 127.5))
        assert pair.mask is None and pair.source == "x.mkv"


def break_partner(folder):
    film(folder / "condition" / "y.mkv")


def break_partner_of_target(folder):
    film(folder / "target" / "z.mkv")


def break_length(folder):
    film(folder / "target" / "x.mkv", frames=11)


def break_size(folder):
    film(folder / "target" / "x.mkv", height=32)


def break_file(folder):
    (folder / "target" / "x.mkv").write_bytes(b"no video")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (break_partner, r"'y.mkv' has no partner in target/ \(1 such\)"),
        (break_partner_of_target, r"'z.mkv' has no partner in condition/ \(1 such\)"),
        (break_length, r"'x.mkv' has 12 frames in condition/ and 11 in target/: pass pairs of equal length"),
        (break_size, r"'x.mkv' has 40x56 pixels in condition/ and 32x56 in target/: pass pairs of equal size"),
        (break_file, r"'x.mkv' cannot be read as a video"),
    ],
)
def test_pairs_that_are_none(tmp_path, harm, sentence):
    folder = tmp_path / harm.__name__
    film(folder / "condition" / "x.mkv")
    film(folder / "target" / "x.mkv")
    harm(folder)
    with pytest.raises((ValueError, OSError), match=sentence):
        paired_clip(folder, generator(), 4, 24, 24)


def test_missing_and_empty_sides(tmp_path):
    film(tmp_path / "condition" / "x.mkv")
    with pytest.raises(NotADirectoryError, match=r"two folders, condition/ and target/.*'target/' is missing"):
        find_pairs(tmp_path)
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No video in 'target/'"):
        replace(TASKS["driving"], folder=tmp_path).clip(0, 4, 24, 24)
