"""What does the bias of truncation do to training? ``python analysis/training_bias.py``.

Two tasks, losses against steps for D = 0, 1, 2, 4 and the exact gradient:

1. Least squares through a linear recurrence in float64 (``analysis.biased_descent``), whose optimum, bias and end point
   are known in closed form. What biased-SGD theory (Ajalloeian and Stich 2020) promises for it is checked: the optimum
   itself when the clips can be fitted exactly (zeta = 0), and else a gap of at most zeta^2 / (2 mu (1 - m)).
2. The small restoration task (``suite.restoration``): a Wan backbone fine-tuned with a pixel loss by Adam through the
   trained decoder. Strategies see the same clips in the same order, so gaps are paired by seed. The theory guarantees a
   truncated step (1 - m) of an exact step's progress, with m = |g_D - g|^2 / |g|^2 of the mean gradient at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from analysis.biased_descent import GROUPS, LinearTask, descend
from analysis.mean_gradient import limits
from analysis.parameter_gradients import gradients
from chopgrad import Chop, Full, Strategy, frame_loss
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.claims import Claim, Verdict
from suite.records import ROOT, Record
from suite.restoration import Restoration, in_full_precision
from suite.restoration_clips import Samples
from suite.restoration_settings import TaskSettings
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DISTANCES = (0, 1, 2, 4, None)
"""None: the exact gradient."""


@dataclass
class Config:
    """Settings of both trainings."""

    full: bool = False
    """The committed run: five seeds and more steps."""
    task: TaskSettings = field(default_factory=lambda: TaskSettings(frames=25, warm_up_steps=20))
    """A short warm-up leaves the pixel loss something to gain in so few steps."""
    seeds: int | None = None
    """Seeds of the end task (default: 2, or 5 with --full)."""
    steps: int | None = None
    """Steps of the end task (default: 8, or 40 with --full)."""
    batch: int = 2
    rate: float = 1e-3
    toy_seeds: int = 20
    toy_steps: int = 3000
    decays: tuple[float, ...] = (0.3, 0.6, 0.9)
    noises: tuple[float, ...] = (0.0, 1.0)
    out: Path | None = None
    """Folder of the records (default: runs/theory, or results/theory with --full)."""

    def __post_init__(self) -> None:
        self.seeds = self.seeds or (5 if self.full else 2)
        self.steps = self.steps or (40 if self.full else 8)
        self.out = self.out or ROOT / ("results" if self.full else "runs") / "theory"

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.seeds and self.steps
        if min(self.seeds, self.steps, self.batch, self.toy_seeds, self.toy_steps) < 1 or not self.rate > 0:
            raise ValueError(
                "Seeds, steps and batch must be at least 1 and the rate positive, got "
                f"{self.seeds}, {self.steps}, {self.batch}, {self.rate}."
            )


def label(distance: int | None) -> str:
    return "exact" if distance is None else f"D={distance}"


def toy(config: Config, decay: float, noise: float) -> Record:
    """One kind of linear problem, all distances and seeds."""
    settings = {"decay": decay, "noise": noise, "seeds": config.toy_seeds, "steps": config.toy_steps, "groups": GROUPS}

    def compute() -> dict[str, Any]:
        task = LinearTask.draw(config.toy_seeds, decay, noise)
        rows = []
        for distance in DISTANCES:
            d = descend(task, GROUPS - 1 if distance is None else distance, config.toy_steps)
            powers = torch.arange(config.toy_steps + 1)[:, None]
            promised = d.rate**powers * d.start + 1e-12 * d.start
            shown = sorted({round(config.toy_steps ** (k / 40)) for k in range(41)})
            rows.append(
                {
                    "distance": distance,
                    "relative_gap": list(mean_interval((d.gap / d.start).tolist())),
                    "relative_bound": [None if math.isinf(x) else x for x in (d.bound / d.start).tolist()],
                    "relative_gaps": (d.gap / d.start).tolist(),
                    "descent_gaps": (d.descent[-1] / d.start).tolist(),
                    "adam_gaps": (d.adam[-1] / d.start).tolist(),
                    "relative_bias": d.relative_bias.tolist(),
                    "converges": int(d.converges.sum()),
                    "within_rate": int((d.descent <= promised).all(0).sum()),
                    "curve_steps": shown,
                    "curve": [(d.descent[t] / d.start).mean().item() for t in shown],
                }
            )
        return {"rows": rows, "claims": [asdict(c) for c in toy_claims(rows, decay, noise)]}

    assert config.out
    return run_case(config.out / f"training_bias-toy-decay{decay}-noise{noise}.json", settings, compute)


def toy_claims(rows: list[dict[str, Any]], decay: float, noise: float) -> list[Claim]:
    """What the theory promises for this problem against what descent did."""
    cut = [r for r in rows if r["distance"] is not None]
    covered = [(r, k) for r in cut for k, q in enumerate(r["relative_bias"]) if q < 1]
    gaps = ", ".join(f"{label(r['distance'])} {r['relative_gap'][0]:.1e}" for r in cut)
    if not covered:
        return []
    if noise == 0:
        worst = max(r["descent_gaps"][k] for r, k in covered)
        slow = sum(r["within_rate"] for r in rows)
        return [
            Claim(
                "When all clips can be fitted exactly and the relative bias is below 1, truncated training reaches the "
                "optimum (Ajalloeian and Stich 2020 with zeta = 0).",
                "ours",
                "holds" if worst < 1e-9 else "fails",
                f"decay {decay}: "
                f"largest remaining gap {worst:.1e} of the gap at the start, over {len(covered)} runs; promised rate "
                f"kept in {slow} of {sum(len(r['relative_bias']) for r in rows)} runs",
            )
        ]
    ratios = sorted(r["relative_bound"][k] / r["descent_gaps"][k] for r, k in covered)
    adam = [a / g for r in cut for a, g in zip(r["adam_gaps"], r["relative_gaps"], strict=True)]
    mean, low, high = mean_interval(adam)
    return [
        Claim(
            "When clips cannot be fitted exactly, truncated training ends within zeta^2 / (2 mu (1 - m)) of the "
            "least loss (Ajalloeian and Stich 2020).",
            "ours",
            "holds" if ratios[0] >= 1 else "fails",
            f"decay {decay}: "
            f"bound / gap between {ratios[0]:.1f} and {ratios[-1]:.1f}, median {ratios[len(ratios) // 2]:.1f}, over "
            f"{len(covered)} runs; gap relative to the start: {gaps}",
        ),
        Claim(
            "An optimiser that rescales gradients (Adam) removes the effect of truncation on where training ends.",
            "Sec. 3.3",
            _below((mean, low, high), 0.5),
            f"decay {decay}: gap with Adam / gap of gradient descent {with_interval((mean, low, high))}",
        ),
    ]


def _below(interval: Sequence[float], threshold: float) -> Verdict:
    _, low, high = interval
    return "holds" if high < threshold else "fails" if low > threshold else "undecided"


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
    assert config.out and config.steps
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
        bar = track(range(steps), description=f"seed {seed}, {label(distance)}", console=Console(stderr=True))
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
    return run_case(config.out / "training_bias" / name, settings, compute, config.task.device)


def end_task(config: Config) -> Record:
    """Every seed and strategy, then gaps and claims from their records."""
    assert config.out and config.seeds
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
        config.out / "training_bias-end_task.json",
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


def gaps(runs: dict[tuple[int, int | None], dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Per distance: mean curves, the final gap to the exact run, and the share of its progress; paired by seed."""
    rows = []
    for distance in DISTANCES:
        mine, exact = ([runs[s, d] for s in range(seeds)] for d in (distance, None))
        last = list(mine[0]["fresh_mse"])[-1]
        progress = [m["fresh_mse"]["0"] - m["fresh_mse"][last] for m in mine]
        reference = [m["fresh_mse"]["0"] - m["fresh_mse"][last] for m in exact]
        tail = max(1, len(mine[0]["training_mse"]) // 5)
        trained = [sum(m["training_mse"][-tail:]) / tail for m in mine]
        best = [sum(m["training_mse"][-tail:]) / tail for m in exact]
        rows.append(
            {
                "distance": distance,
                "final_fresh_mse": list(mean_interval([m["fresh_mse"][last] for m in mine])),
                "final_fresh_gap": list(mean_interval([b - a for a, b in zip(progress, reference, strict=True)])),
                "final_training_gap": list(mean_interval([a - b for a, b in zip(trained, best, strict=True)])),
                "progress": list(mean_interval(progress)),
                # A ratio of sums: single seeds may make next to no progress.
                "progress_share": _ratio(progress, reference),
                "training_curve": [sum(x) / seeds for x in zip(*(m["training_mse"] for m in mine), strict=True)],
                "fresh_curve": {k: sum(m["fresh_mse"][k] for m in mine) / seeds for k in mine[0]["fresh_mse"]},
            }
        )
    return rows


def _ratio(values: list[float], reference: list[float], resamples: int = 4000) -> list[float] | None:
    """[ratio of means, low, high], resampled by seed; None unless the reference is positive throughout."""
    a, b = torch.tensor(values, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    picks = torch.randint(len(a), (resamples, len(a)), generator=torch.Generator().manual_seed(0))
    below = b[picks].mean(1)
    if below.min() <= 0:
        return None
    low, high = torch.quantile(a[picks].mean(1) / below, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [(a.mean() / b.mean()).item(), low, high]


def end_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The ablation's statement (the distance matters little), and the theory's guarantee."""
    cut = [r for r in rows if r["distance"] is not None]
    shares = {label(r["distance"]): r["progress_share"] for r in cut}
    text = "; ".join(f"{k} {'undefined' if v is None else with_interval(v, 2)}" for k, v in shares.items())
    gap = "; ".join(
        f"{label(r['distance'])} [{r['final_fresh_gap'][1]:.1e}, {r['final_fresh_gap'][2]:.1e}]" for r in cut
    )
    d1 = next(r["progress_share"] for r in cut if r["distance"] == 1)
    promised = [
        (r, m) for r in cut if (m := r["squared_relative_bias"]) is not None and r["progress_share"] is not None
    ]
    met: list[Verdict] = []
    for r, m in promised:
        least, (_, low, high) = 1 - m[0], r["progress_share"]
        met.append("holds" if low >= least else "fails" if high < least else "undecided")
    worst: Verdict = "fails" if "fails" in met else "undecided" if "undecided" in met or not met else "holds"
    return [
        Claim(
            "The truncation distance matters little for training: D = 1 makes at least 90 % of the exact gradient's "
            "progress.",
            "Table 2, ablation",
            "undecided" if d1 is None else _below([-x for x in (d1[0], d1[2], d1[1])], -0.9),
            f"share of the exact run's progress on fresh clips: {text}; final gap in MSE: {gap}",
        ),
        Claim(
            "Truncated steps make at least (1 - m) of exact steps' progress; m = |g_D - g|^2 / |g|^2 at the start.",
            "ours",
            worst,
            "; ".join(
                f"{label(r['distance'])} promised {1 - m[0]:.2f}, made {with_interval(r['progress_share'], 2)}"
                for r, m in promised
            )
            or "no distance with a mean gradient and a progress that stand out from noise",
        ),
    ]


def figure(toys: list[Record], end: Record, path: Path) -> None:
    """Toy curves with their closed-form gaps, and the end task's curves and gaps."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    fitted = [r for r in toys if r.settings["noise"] == 0] or toys[:1]
    noisy = [r for r in toys if r.settings["noise"] > 0] or toys[-1:]
    for axis, record in ((axes[0, 0], fitted[len(fitted) // 2]), (axes[0, 1], noisy[len(noisy) // 2])):
        for k, row in enumerate(record.metrics["rows"]):
            axis.loglog(
                row["curve_steps"], [max(x, 1e-16) for x in row["curve"]], color=f"C{k}", label=label(row["distance"])
            )
            if record.settings["noise"] and row["distance"] is not None:
                axis.axhline(row["relative_gap"][0], color=f"C{k}", linestyle=":", linewidth=1)
        axis.set_title(f"linear recurrence, decay {record.settings['decay']}, noise {record.settings['noise']:g}")
        axis.set_xlabel("steps of gradient descent")
        axis.set_ylabel("loss above the optimum, relative to the start")
    axes[0, 1].set_ylim(bottom=1e-8)
    for k, row in enumerate(end.metrics["rows"]):
        steps = [int(s) for s in row["fresh_curve"]]
        axes[1, 0].plot(
            steps, list(row["fresh_curve"].values()), "-o", markersize=3, color=f"C{k}", label=label(row["distance"])
        )
        if row["distance"] is not None:
            mean, low, high = row["final_fresh_gap"]
            axes[1, 1].errorbar(
                [label(row["distance"])], [mean], [[mean - low], [high - mean]], fmt="o", capsize=4, color=f"C{k}"
            )
    s = end.settings
    axes[1, 0].set_title(f"restoration, {s['task']['frames']} frames of {s['task']['size']} pixels, {s['seeds']} seeds")
    axes[1, 0].set_xlabel("steps of Adam")
    axes[1, 0].set_ylabel("MSE on fresh clips")
    axes[1, 1].axhline(0, color="k", linewidth=1)
    axes[1, 1].set_title("final gap, paired by seed, 95 % interval")
    axes[1, 1].set_ylabel("MSE on fresh clips minus that of the exact run")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        axis.legend(fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(record: Record) -> str:
    """Markdown table of the end task."""
    text = lambda x, digits=2: "undefined" if x is None else with_interval(x, digits)  # noqa: E731
    rows = [
        [label(r["distance"]), text(r["final_fresh_mse"], 5), text(r["final_fresh_gap"], 6), text(r["progress_share"])]
        + [text(r["squared_relative_bias"]) if r["distance"] is not None else "0"]
        for r in record.metrics["rows"]
    ]
    return markdown_table(
        ["strategy", "final MSE", "gap to exact", "share of exact's progress", "m at the start"], rows
    )


def main(config: Config) -> None:
    config.check()
    assert config.out
    toys = [toy(config, decay, noise) for decay in config.decays for noise in config.noises]
    end = end_task(config)
    figure(toys, end, config.out / "training_bias.png")
    print(table(end))
    for record in [*toys, end]:
        for claim in record.metrics["claims"]:
            print(f"- {claim['verdict']}: {claim['statement']} ({claim['evidence']})")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
