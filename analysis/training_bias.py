"""What does the bias of truncation do to training? ``python analysis/training_bias.py``.

Two tasks, losses against steps for D = 0, 1, 2, 4 and the exact gradient:

1. Least squares through a linear recurrence in float64 (``analysis.training.biased_descent``), whose optimum, bias and
   end point are known in closed form. What biased-SGD theory (Ajalloeian and Stich 2020) promises for it is checked:
   the optimum itself when the clips can be fitted exactly (zeta = 0), and else a gap of at most
   zeta^2 / (2 mu (1 - m)).
2. The small restoration task (``analysis.backbone.restoration``): a backbone fine-tuned with a pixel loss by Adam
   through the trained decoder. Strategies see the same clips in the same order, so gaps are paired by seed. The theory
   guarantees a truncated step (1 - m) of an exact step's progress, with m = |g_D - g|^2 / |g|^2 of the mean gradient
   at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from analysis.backbone.mean_gradient import limits
from analysis.backbone.parameter_gradients import gradients
from analysis.backbone.restoration import Restoration, in_full_precision
from analysis.backbone.samples import Samples
from analysis.backbone.task_settings import TaskSettings
from analysis.settings import OnTask
from analysis.training.figure import figure, table
from analysis.training.gaps import DISTANCES, end_claims, gaps, label
from analysis.training.toy import toy
from chopgrad import Chop, Full, Strategy, frame_loss
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.command_line import run_main
from suite.printing import print_claims
from suite.progress import track
from suite.records import Record


@dataclass
class Config(OnTask):
    """Settings of both trainings."""

    full: bool = False
    """The committed run: five seeds and more steps."""
    task: TaskSettings = field(default_factory=lambda: TaskSettings(frames=25, warm_up_steps=20))
    """A short warm-up leaves the pixel loss something to gain in so few steps."""
    seeds: int | None = None
    """Seeds of the end task. None: 2, or 5 with --full."""
    steps: int | None = None
    """Steps of the end task. None: 8, or 40 with --full."""
    batch: int = 2
    rate: float = 1e-3
    toy_seeds: int = 20
    toy_steps: int = 3000
    decays: tuple[float, ...] = (0.3, 0.6, 0.9)
    noises: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self.seeds = self.seeds or (5 if self.full else 2)
        self.steps = self.steps or (40 if self.full else 8)

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.seeds and self.steps
        if min(self.seeds, self.steps, self.batch, self.toy_seeds, self.toy_steps) < 1 or not self.rate > 0:
            raise ValueError(
                "Seeds, steps and batch must be at least 1 and the rate positive, got "
                f"{self.seeds}, {self.steps}, {self.batch}, {self.rate}."
            )


def strategy_of(distance: int | None) -> Strategy:
    return Full() if distance is None else Chop(distance)


def train(
    task: Restoration,
    clips: Callable[[int, int], Samples],
    config: Config,
    seed: int,
    distance: int | None,
    fingerprint: str,
) -> Record:
    """One run on the end task: Adam from the warmed-up backbone, the same clips for every strategy of a seed.

    Args:
        clips: (count, seed) -> clips.
    """
    assert config.steps
    steps = config.steps
    settings = {
        "task": task.described(),
        "seed": seed,
        "distance": distance,
        "steps": steps,
        "batch": config.batch,
        "rate": config.rate,
        "optimiser": "Adam",
        "inputs_sha256": fingerprint,
    }

    def compute() -> dict[str, Any]:
        backbone = task.warmed_up(fingerprint, seed)
        data = clips(min(steps * config.batch, 48), 1_000 + seed)
        fresh = clips(8, 2_000 + seed)
        optimizer = torch.optim.Adam(backbone.parameters(), config.rate)
        generator = torch.Generator().manual_seed(seed)
        mse = in_full_precision(F.mse_loss)
        losses, evaluated = [], {0: task.pixel_loss(backbone, fresh)}
        bar = track(range(steps), description=f"seed {seed}, {label(distance)}")
        for step in bar:
            rows = torch.randint(len(data), (config.batch,), generator=generator)
            restored = task.restore(backbone, data.condition[rows])
            loss = frame_loss(task.decoder, restored, data.clean[rows], mse, strategy_of(distance))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % max(1, steps // 4) == 0 or step + 1 == steps:
                evaluated[step + 1] = task.pixel_loss(backbone, fresh)
        return {"training_mse": losses, "fresh_mse": {str(k): sum(v) / len(v) for k, v in evaluated.items()}}

    name = f"seed{seed}-{'exact' if distance is None else f'd{distance}'}.json"
    return run_case(config.folder / "training_bias" / name, settings, compute, config.task.device)


def end_task(config: Config) -> Record:
    """Every seed and strategy, then gaps and claims from their records."""
    assert config.seeds
    task = Restoration(config.task)
    longest = max(d for d in DISTANCES if d is not None)
    if len(task.groups) < longest + 2:
        raise ValueError(
            f"{config.task.frames} frames are {len(task.groups)} frame groups, so D = {longest} would be exact: pass "
            "more --task.frames."
        )
    fingerprint = task.fingerprint()
    clips = lru_cache(maxsize=2)(task.samples)  # of one seed: all its strategies see the same
    runs = {
        (seed, d): train(task, clips, config, seed, d, fingerprint).metrics
        for seed in range(config.seeds)
        for d in DISTANCES
    }
    settings = {k: getattr(config, k) for k in ("seeds", "steps", "batch", "rate")} | {"task": task.described()}

    def compute() -> dict[str, Any]:
        bias = relative_bias(task, fingerprint, config.seeds or 1)
        rows = gaps(runs, config.seeds or 1)
        for row in rows:
            row["squared_relative_bias"] = bias.get(row["distance"])
        return {"rows": rows, "claims": [asdict(c) for c in end_claims(rows)]}

    return run_case(
        config.folder / "training_bias-end_task.json",
        settings | {"inputs_sha256": fingerprint, "optimiser": "Adam"},
        compute,
        config.task.device,
    )


def relative_bias(task: Restoration, fingerprint: str, seeds: int) -> dict[int, list[float] | None]:
    """m = |mean g_D - mean g|^2 / |mean g|^2 at the start, over the seeds; None where noise hides the mean gradient."""
    found: dict[int, list[float]] = {}
    for seed in range(seeds):
        samples = task.samples(12, seed=3_000 + seed)
        g = gradients(task, task.warmed_up(fingerprint, seed), samples, F.mse_loss, (1,))
        for (_, distance), chopped in g.truncated.items():
            error, _ = limits(chopped, g.full, torch.ones(1, len(samples)))
            found.setdefault(distance, []).append(error.item() ** 2)
    return {d: None if any(map(math.isnan, x)) else list(mean_interval(x)) for d, x in found.items()}


def main(config: Config) -> None:
    config.check()
    toys = [
        toy(config.folder, config.toy_seeds, config.toy_steps, decay, noise)
        for decay in config.decays
        for noise in config.noises
    ]
    end = end_task(config)
    figure(toys, end, config.folder / "training_bias.png")
    print(table(end))
    print_claims([*toys, end], bullets=True)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
