"""Videos are read as they are, cropped as asked, and refused in one sentence when that cannot be."""

import av
import numpy as np
import pytest
import torch

from suite.clips import HELD_OUT_CLIPS, find_clips, fit, load_clip, packaged_clip, random_crop, read_frames, to_unit
from suite.motion import moving_clip


@pytest.fixture
def video(tmp_path):
    """Twelve frames of 48x32, each of one grey level, losslessly coded."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def test_frames_are_read_in_order(video):
    frames = read_frames(video)
    assert frames.shape == (12, 32, 48, 3)
    assert frames[:, 0, 0, 0].tolist() == [20 * k for k in range(12)]
    assert read_frames(video, limit=3, start=5)[:, 0, 0, 0].tolist() == [100, 120, 140]


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
    clip = to_unit(np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8))
    first, again, other = (random_crop(clip, 32, 32, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (3, 2, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1
    assert random_crop(clip, 80, 80, torch.Generator()).shape[-2:] == (80, 80)  # larger than the picture: enlarged


def test_generated_clips_move_and_are_seeded():
    make = lambda seed, objects: moving_clip(torch.Generator().manual_seed(seed), 9, 48, 48, objects)  # noqa: E731
    clip = make(0, 2)
    assert clip.shape == (3, 9, 48, 48)
    assert clip.abs().max() <= 1
    assert torch.equal(clip, make(0, 2))
    assert not torch.equal(clip, make(1, 2))
    assert (clip[:, 1:] - clip[:, :-1]).abs().mean() > 0.005
    assert not torch.equal(clip, make(0, 0))  # objects pass in front
