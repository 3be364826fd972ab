"""Checkpoints of a training run: written whole or not at all, and refused where they are of another run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from weights.settings import Config

FREE = ("image_steps", "clip_steps", "snapshot_steps", "start", "device", "threads", "checkpoint_every_seconds")
"""Settings that a run may go on with others of. More steps change nothing before the learning rate falls."""
PARTS = {"settings", "model", "optimizers", "average", "step", "seconds", "running", "log"}


def write(path: Path, config: Config, state: dict[str, Any]) -> None:
    """The state of a run after a step; an interruption leaves the file that was there."""
    torch.save(state | {"settings": config.recorded()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def read(path: Path, config: Config) -> dict[str, Any]:
    """The state that was written, on the CPU, from where optimisers and models take what they need elsewhere.

    Raises:
        ValueError: not a checkpoint, or one of a run with other settings.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"'{path}' is not a checkpoint of weights/train.py: {reason}") from error
    if not isinstance(saved, dict) or saved.keys() != PARTS:
        raise ValueError(f"'{path}' is not a checkpoint of weights/train.py, or an older one: move it away.")
    before, now = saved["settings"], config.recorded()
    differing = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"'{path}' is of a run with {name} {before.get(name)}, but {now[name]} was asked for: "
            "pass that setting, or another folder with --run."
        )
    return saved
