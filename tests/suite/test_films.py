"""A film read in part gives the frames that reading all of it gives, upright, and one sentence where that fails."""

import re
import weakref
from functools import cache

import av
import numpy as np
import pytest

from suite import clips, films
from suite.clips import packaged_clip, read_frames, seeded_crop, usable
from suite.films import index, pictures, stretch
from tests.suite.films import cut_short, picture, show_by, write_film, write_sound

UNEVEN = [33 * k + 13 * (k % 3) for k in range(40)]
"""Milliseconds."""
KINDS = {
    "b-frames.mp4": {},
    "b-frames.mkv": {},
    "b-frames.avi": {},  # keeps no presentation times
    "open.mov": {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=10"}},  # no keyframe but the first
    "uneven.mp4": {"times": UNEVEN},
    "uneven.mkv": {"times": UNEVEN},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "10"}},
    "ten-bits.mp4": {"pix_fmt": "yuv420p10le"},
    "odd.mp4": {"pix_fmt": "yuv444p", "size": (33, 47)},
    "odd.mkv": {"codec": "ffv1", "pix_fmt": "bgr0", "size": (31, 45)},
    "alpha.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "alpha.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}
SOUGHT = {"b-frames.mp4", "b-frames.mkv", "open.mov", "uneven.mp4", "uneven.mkv", "mpeg4.mp4", "ten-bits.mp4",
          "odd.mp4", "odd.mkv", "alpha.mkv", "vp9.webm"}  # fmt: skip


def all_frames(path):
    """What PyAV gives from the first frame to the last, without a line of ours."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a kind -> a film of it."""
    folder = tmp_path_factory.mktemp("films")
    return cache(lambda name: write_film(folder / name, **KINDS[name]))


@pytest.mark.parametrize("name", KINDS)
def test_a_part_is_what_reading_all_gives(made, monkeypatch, name):
    path = made(name)
    expected = all_frames(path)
    assert len(expected) == index(path).length == 40
    if name in SOUGHT:
        monkeypatch.setattr(films, "_from_the_beginning", lambda path: pytest.fail("decoded from the beginning"))
    for start in (1, 8, 10, 19, 25, 33, 38):
        got = list(pictures(path, start, 4))
        assert len(got) == min(4, 40 - start)
        assert all(np.array_equal(a, b) for a, b in zip(got, expected[start:], strict=False)), start


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_in_order_and_in_colour(made, name):
    path = made(name)
    size = KINDS[name].get("size", (32, 48))
    loss = {"a.gif": 85, "vp8.webm": 40, "vp9.webm": 40, "mpeg4.mp4": 40}.get(name, 16)  # a GIF has four levels of blue
    for k, got in enumerate(stretch(path, 0, 40)):
        assert got.shape == (*size, 3)
        expected = picture(k, *size)
        for y, x in ((2, 3), (2, size[1] - 4), (size[0] - 6, size[1] // 2)):  # corners and the grey
            assert np.abs(got[y, x].astype(int) - expected[y, x]).max() <= loss, (k, y, x)


def test_a_part_of_a_packaged_film(monkeypatch):
    path = packaged_clip("bikes")
    expected = read_frames(path, 33)[30:]
    assert index(path).length == 250
    monkeypatch.setattr(films, "_from_the_beginning", lambda path: pytest.fail("decoded from the beginning"))
    assert np.array_equal(read_frames(path, 3, 30), expected)


def test_one_picture_is_held_at_a_time(tmp_path, monkeypatch):
    path = write_film(tmp_path / "a.mp4", size=(96, 128))
    alive, counts, upright = [], [], films._upright

    def watched(*stored):
        found = upright(*stored)
        alive.append(weakref.ref(found))
        counts.append(sum(reference() is not None for reference in alive))
        return found

    monkeypatch.setattr(films, "_upright", watched)
    crop, _ = seeded_crop(path, 0, 9, (16, 16), 0)
    assert crop.shape == (1, 3, 9, 16, 16)
    assert len(counts) == 9 and max(counts) <= 2
    assert crop.untyped_storage().nbytes() == crop.numel() * 4


TURNS = {
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "to the right": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "to the left": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "on its head": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "mirrored and to the left": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "mirrored and to the right": ((0, -1, -1, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_is_shown_upright(tmp_path, turn):
    matrix, expected = TURNS[turn]
    path = write_film(tmp_path / "a.mp4", frames=3)
    lying = all_frames(path)
    show_by(path, *matrix)
    for got, stored in zip(read_frames(path), lying, strict=True):
        assert np.array_equal(got, expected(stored))
    with av.open(str(path)) as file:
        rotation = next(file.decode(video=0)).rotation
    if "mirrored" not in turn and turn != "upside down":
        assert np.array_equal(expected(lying[0]), np.rot90(lying[0], rotation // 90))


def test_a_changed_film_is_looked_at_anew(tmp_path):
    path = write_film(tmp_path / "a.mkv", frames=12)
    assert index(path).length == 12
    write_film(path, frames=14)
    assert index(path).length == 14


def test_what_cannot_be_used_is_left_out_and_told(tmp_path):
    good = write_film(tmp_path / "good.mp4")
    bad = {
        write_sound(tmp_path / "sound.mp4"): "'sound.mp4' has no video stream.",
        write_film(tmp_path / "short.mp4", frames=8): "'short.mp4' has 8 frames, but 9 are needed: pass fewer frames",
        cut_short(write_film(tmp_path / "cut.mp4")): r"'cut.mp4' cannot be read to its end: only \d+ of its 40 frames",
        cut_short(write_film(tmp_path / "cut.mkv"), 0.02): "'cut.mkv' ",
        tmp_path / "empty.mp4": "'empty.mp4' cannot be read as a video: Invalid data found",
        tmp_path / "absent.mp4": "'absent.mp4' cannot be read as a video: No such file or directory.",
    }
    (tmp_path / "empty.mp4").touch()
    with pytest.warns(UserWarning, match="left out: ") as warned:
        found, left_out = usable([*bad, good], 9, crops=2)
    assert found == [good]
    assert list(left_out) == [path.name for path in bad]
    assert [str(w.message) for w in warned] == [f"left out: {sentence}" for sentence in left_out.values()]
    for sentence, words in zip(left_out.values(), bad.values(), strict=True):
        assert re.match(words, sentence), sentence
        assert str(tmp_path) not in sentence
    with pytest.raises(ValueError, match=r"None of the 2 videos can be used, the first because 'sound.mp4' has no vid"):
        usable(list(bad)[:2], 9)
    with pytest.raises(ValueError, match=r"^'sound.mp4' has no video stream.$"):
        usable(list(bad)[:1], 9)


def test_damage_where_a_crop_lies_is_found_before_anything_is_measured(tmp_path):
    path = write_film(tmp_path / "a.mp4")
    with av.open(str(path)) as file:
        damaged = next(p for k, p in enumerate(file.demux(video=0)) if k == 25)
        begin, size = damaged.pos, damaged.size
    data = bytearray(path.read_bytes())
    data[begin : begin + size] = b"\xff" * size
    path.write_bytes(data)
    assert index(path).length == 40  # nothing was decoded
    with pytest.raises(ValueError, match=r"^'a.mp4' cannot be read to its end: Invalid data found"):
        list(stretch(path, 20, 10))
    assert len(list(stretch(path, 2, 10))) == 10
    with pytest.raises(ValueError, match=r"^'a.mp4' cannot be read to its end"):
        usable([path], 30, crops=3)
    usable([path], 30)


def test_a_film_with_fewer_frames_than_it_says(tmp_path, monkeypatch):
    path = write_film(tmp_path / "a.mkv", frames=12)
    monkeypatch.setattr(clips, "index", lambda path: films.Index(20))
    with pytest.raises(ValueError, match=r"^'a.mkv' cannot be read to its end: it has no frame 12.$"):
        seeded_crop(path, 0, 19, (16, 16), 0)
