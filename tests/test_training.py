"""Training of the embedded decoders: the shortcut is exact, an interrupted run ends where an uninterrupted one does."""

import json

import pytest
import torch
from diffusers import AutoModel

from tests.models import build
from weights import train


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_single_frames_as_images_changes_nothing(name):
    vae = build(name)
    picture = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64)

    def gradient():
        leaf = picture.clone().requires_grad_()
        latents = vae.encode(leaf).latent_dist.mode()
        out = vae.decode(latents).sample
        return out, *torch.autograd.grad(out.square().sum(), leaf)

    expected = gradient()
    with train.single_frames_as_images():
        got = gradient()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture
def small(monkeypatch):
    """Training of a tiny model on generated clips only, with a checkpoint after each step."""

    def config(name, folder, **changes):
        settings = {"image_steps": 2, "clip_steps": 3, "image_batch": 2, "clip_batch": 1, "clip_frames": 9, "size": 16}
        settings |= {"real_share": 0.0, "device": "cpu", "checkpoint_every_seconds": -1.0}
        settings |= {"run": folder / "run", "out": folder / "model"}
        return train.Config(model=name, **(settings | changes))

    wide = train.build  # CogVideoX is built as it is; the random models of the tests are no autoencoders
    tiny = {"wan2.1": lambda name: build(name, torch.float32).requires_grad_(True).train(), "cogvideox": wide}
    monkeypatch.setattr(train, "build", lambda name: tiny[name](name))
    monkeypatch.setattr(train.Diet, "__init__", lambda self, config: setattr(self, "config", config))
    return config


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(name, small, tmp_path, monkeypatch):
    whole = AutoModel.from_pretrained(str(train.train(small(name, tmp_path / "whole"))))
    batch = train.Diet.batch

    def interrupted(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Diet, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(small(name, tmp_path / "parts"))
    out = train.train(small(name, tmp_path / "parts"))
    resumed = AutoModel.from_pretrained(str(out))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    start = train.build(name)
    pairs = zip(start.parameters(), resumed.parameters(), strict=True)
    assert not all(torch.equal(a.half().float(), b) for a, b in pairs)  # it is saved in float16
    record = json.loads((out / "training.json").read_text())
    assert [row[0] for row in record["log"]["rows"]] == [5]
    assert record["settings"]["seed"] == 0
    assert record["train_seconds"] >= 0


def test_a_finished_model_can_be_trained_further(small, tmp_path):
    first = train.train(small("wan2.1", tmp_path / "first"))
    again = train.train(small("wan2.1", tmp_path / "second", start=first, image_steps=0, clip_steps=1, seed=1))
    a, b = (AutoModel.from_pretrained(str(x)) for x in (first, again))
    difference = max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert 0 < difference < 0.01
    record = json.loads((again / "training.json").read_text())
    assert record["earlier"] == json.loads((first / "training.json").read_text())


def test_clips_that_fit_no_frame_group_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="clip_frames must be 1 more than a multiple of 8, got 6"):
        train.train(small("wan2.1", tmp_path, clip_frames=6))
