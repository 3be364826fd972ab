"""A clip for the auditor: read, turned, shrunk and cut; or one sentence. Needs PyAV."""

import numpy as np
import pytest
import torch

from chopgrad.__main__ import main
from chopgrad.clip import read_clip
from tests.models import build

av = pytest.importorskip("av")


def film(path, shape=(24, 32), frames=5, video=True):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8) if video else file.add_stream("aac", rate=8000)
        if not video:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.sample_rate = 8000
            file.mux(stream.encode(sound))
        else:
            stream.height, stream.width, stream.pix_fmt = *shape, "yuv420p"
            for k in range(frames):
                picture = np.full((*shape, 3), 20 * k, np.uint8)
                picture[:, : shape[1] // 2] = 250
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())
    return path


def test_a_clip_is_shrunk_and_cut_in_the_middle(tmp_path):
    clip = read_clip(film(tmp_path / "a.mp4", (24, 64)), 4, 12, 12)
    assert clip.shape == (1, 3, 4, 12, 12)
    assert clip.abs().max() <= 1
    assert clip[..., :5].mean() > 0.8 > clip[:, :, 0, :, 7:].mean()
    assert clip[0, 0, 3, 6, 10] > clip[0, 0, 0, 6, 10]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ((6, 12, 12), "has 5 frames, fewer than 6"),
        ((2, 48, 12), "is 24x32, smaller than 48x12"),
        ((0, 12, 12), "at least one frame"),
    ],
)
def test_a_clip_that_does_not_fit_is_told(tmp_path, how, words):
    with pytest.raises(ValueError, match=words):
        read_clip(film(tmp_path / "a.mp4"), *how)


def test_a_file_that_is_no_video_is_told(tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_clip(tmp_path / "b.mp4", 1, 8, 8)
    with pytest.raises(ValueError, match="has no video stream"):
        read_clip(film(tmp_path / "c.mp4", video=False), 1, 8, 8)


def test_the_command_takes_a_clip(tmp_path, capsys):
    folder = tmp_path / "vae"
    build("wan2.1", torch.float32).save_pretrained(folder)
    clip = str(film(tmp_path / "a.mp4"))
    assert main(["audit", "--vae", str(folder), "--clip", clip, "--frames", "5", "--size", "16x16"]) == 0
    text = capsys.readouterr().out
    assert "Nothing is broken." in text
    assert "says little" not in text
    assert main(["audit", "--vae", str(folder), "--clip", clip, "--frames", "4", "--size", "16x16"]) == 2
    assert "pass as many frames" in capsys.readouterr().err
