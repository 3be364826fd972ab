"""A small training run, and small clips for it."""

import pytest
import torch

from suite.clips import HELD_OUT_CLIPS
from suite.motion import photographs
from tests.models import build
from weights import data, train

NO_CLIPS = {"videos": [], "photographs": photographs()}


@pytest.fixture
def real(monkeypatch):
    """A small packaged clip in place of the large ones."""
    monkeypatch.setattr(data, "TRAINING_CLIPS", HELD_OUT_CLIPS)


@pytest.fixture
def small(monkeypatch):
    """Training of a tiny model on generated clips only, with a checkpoint after each step."""

    def config(name, folder, **changes):
        settings = {"image_steps": 2, "clip_steps": 3, "image_batch": 2, "clip_batch": 1, "clip_frames": 9, "size": 16}
        settings |= {"real_share": 0.0, "device": "cpu", "checkpoint_every_seconds": -1.0}
        settings |= {"run": folder / "run", "out": folder / "model"}
        return train.Config(model=name, **(settings | changes))

    batch = train.Diet.batch  # of steps that are none, the latents' statistics are taken
    few = lambda self, step, *shape: batch(self, step, *(shape if step < 10_000_000 else (1, 9)))  # noqa: E731
    monkeypatch.setattr(train.Diet, "batch", few)
    wide = train.build  # CogVideoX is built as it is; the random models of the tests are no autoencoders
    tiny = {"wan2.1": lambda name, channels: build(name, torch.float32).requires_grad_(True).train(), "cogvideox": wide}
    monkeypatch.setattr(train, "build", lambda name, channels: tiny[name](name, channels))
    monkeypatch.setattr(train.Diet, "__init__", lambda self, config: vars(self).update(NO_CLIPS, config=config))
    return config
