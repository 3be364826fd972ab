"""Artifact removal in novel-view synthesis (arXiv 2603.17812, Table 2): clean renders of splats fitted to few views."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.tasks import task
from bench.tasks.data.footage import paired_clip
from bench.tasks.scenes import raycast, room, splats
from bench.tasks.scenes.room import Room
from bench.tasks.scenes.splats import fit, render, seed_splats
from bench.tasks.task import LossTerm, Pair, Task
from suite.records import ROOT


@dataclass(frozen=True)
class ArtifactRemoval(Task):
    """Target: a swing through a procedural room; condition: the same swing through splats fitted to every
    ``every``-th frame of it. Floaters, holes and smears between these frames come from the fit's lack of views.

    ``folder``: ``condition/`` and ``target/`` with videos of equal names; without it, the room.

    Attributes:
        every: the views of the fit are the frames 0, every, 2 every, ... (the paper: every 50th frame of real video).
        splats_per_view, steps_per_view: size and length of the fit, per 64x64 pixels of a view and per view.
        cache: fitted renders are kept here under a fingerprint of settings, seed and code; None keeps nothing.

    Cost: about 5 s for 17 frames of 64x64 on one core, most of it the fit, which is kept. A fit amplifies rounding: on
    another processor or release of torch the condition may differ visibly, the target does not.
    """

    every: int = 8
    splats_per_view: int = 900
    steps_per_view: int = 40
    cache: Path | None = ROOT / "runs" / "artifact_removal"
    name: str = field(default="artifact-removal", kw_only=True)
    losses: tuple[LossTerm, ...] = field(default=(LossTerm("mse", "latent"), LossTerm("lpips", "pixel")), kw_only=True)

    def check(self) -> None:
        if min(self.every, self.splats_per_view, self.steps_per_view) < 1:
            raise ValueError(
                f"every, splats_per_view and steps_per_view must be at least 1, got {self.every}, "
                f"{self.splats_per_view} and {self.steps_per_view}."
            )

    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        if self.folder is not None:
            condition, target, source = paired_clip(self.folder, generator, frames, height, width)
            return Pair(condition, target, None, source)
        scene = Room.random(generator)
        target = torch.stack([scene.frame(k, height, width) for k in range(frames)], dim=1)
        path = self._cached(seed, frames, height, width)
        if path is not None and path.exists():
            condition = torch.load(path, weights_only=True)
        else:
            condition = self._fitted_render(scene, target, generator)
            if path is not None:
                _save(condition, path)
        return Pair(condition, target, None, f"generated {seed}")

    def fitted_frames(self, frames: int) -> list[int]:
        """The frames that the splats are fitted to."""
        return list(range(0, frames, self.every))

    def _fitted_render(self, scene: Room, target: Tensor, generator: torch.Generator) -> Tensor:
        frames, height, width = target.shape[1:]
        chosen = self.fitted_frames(frames)
        cameras = [scene.camera(k) for k in range(frames)]
        views = [target[:, k] for k in chosen]
        depths = [scene.depth(k, height, width) for k in chosen]
        count = max(1, round(self.splats_per_view * len(chosen) * height * width / 64**2))
        start = seed_splats([cameras[k] for k in chosen], views, depths, count, generator)
        fitted = fit(start, [cameras[k] for k in chosen], views, self.steps_per_view * len(chosen))
        return torch.stack([render(fitted, c, height, width) for c in cameras], dim=1).clamp(0, 1) * 2 - 1

    def _cached(self, seed: int, frames: int, height: int, width: int) -> Path | None:
        if self.cache is None:
            return None
        code = [hashlib.sha256(Path(str(m.__file__)).read_bytes()).hexdigest() for m in (raycast, room, splats, task)]
        code.append(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
        settings = [self.every, self.splats_per_view, self.steps_per_view, seed, frames, height, width]
        key = json.dumps([settings, code, torch.__version__])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.pt"


def _save(condition: Tensor, path: Path) -> None:
    """Whole or not at all: two processes may want the same clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(condition.clone(), file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
