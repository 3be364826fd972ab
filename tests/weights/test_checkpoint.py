"""A checkpoint that is none, or one of another run, is refused in one sentence."""

import pytest
import torch

from weights import checkpoint
from weights.settings import Config

STATE = dict.fromkeys(checkpoint.PARTS - {"settings"}, 0)


def test_a_checkpoint_is_read_as_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, Config("wan2.1"), STATE | {"model": {"a": torch.ones(2)}, "step": 7})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    elsewhere = Config("wan2.1", clip_steps=2000, device="cuda", threads=4, workers=3, minutes=5.0, run=tmp_path)
    saved = checkpoint.read(path, elsewhere)
    assert saved["step"] == 7
    assert saved["settings"]["clip_steps"] == 1300
    assert torch.equal(saved["model"]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config("cogvideox"), "is of a run with model wan2.1, but cogvideox was asked for: pass that setting, or"),
        (Config("wan2.1", latent_channels=64), "with latent_channels 32, but 64"),
        (Config("wan2.1", clip_height=160), "with clip_height 0, but 160"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, config, sentence):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, Config("wan2.1"), STATE)
    with pytest.raises(ValueError, match=sentence):
        checkpoint.read(path, config)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", [1, 2], {"model": {}}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt' is not a checkpoint of weights/train\.py"):
        checkpoint.read(path, Config("wan2.1"))


def test_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": print}, path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.read(path, Config("wan2.1"))
