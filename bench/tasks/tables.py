"""What people look at of the end tasks: tables, verdicts in sentences and pictures (see ``bench.tasks.comparison``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from torch import Tensor

from bench.tasks.comparison import (
    LITTLE,
    NAMES,
    TABLES,
    TaskResults,
    better,
    claims,
    distance_matters,
    pixels_win,
    same_as_exact,
    shares_of_the_gain,
)
from bench.tasks.pictures import side_by_side
from bench.tasks.training.arms import ARMS, MEANING
from suite.claims import Verdict
from suite.metrics import METRICS
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")

REFERENCES = {
    "input": "input, untouched",
    "autoencoder": "target, encoded and decoded",
    "warm-up": "warm-up (the start)",
}
DIGITS = {"psnr": 2, "ssim": 3, "lpips-alex": 3, "lpips-vgg": 3, "dists": 3, "flickering": 4, "warping-error": 2}
SHOWN_TIMES = {"warping-error": 1000}
"""Too small to be read as it is."""
EXPLANATION = """\
Every arm fine-tunes the same backbone from the same start on the same clips in the same order for the same number of
steps; seeds differ in the backbone's first weights, its warm-up and the order. Scores: mean over seeds and test clips,
which no training has seen. Differences: arm minus latent-only, paired by seed and clip, with 95 % bootstrap interval
(seeds and clips are drawn independently, because all seeds share the clips); **bold** where the interval excludes 0 in
the arm's favour, _slanted_ where it excludes 0 against it. FVD on so few clips is mostly noise: under the scores stands
the FVD between two halves of the targets, and only its differences, paired by seed, mean anything; with so few seeds
none is marked. Blur raises flickering (higher is smoother) and lowers the warping error, so a sharper video scores
worse on both: compare with the row of the target, encoded and decoded, which is also what a perfect loss in latent
space would give. Time and peak memory of one step (backbone, decoder and loss) were measured apart, arms interleaved.
"""


def table(results: TaskResults) -> str:
    """One task as Markdown."""
    lines = [
        f"# {TABLES[results.task]}",
        "",
        _settings(results),
        "",
        f"![Pictures]({results.task}.png)",
        "",
        EXPLANATION.rstrip(),
        "",
    ]
    header = ["arm", *(head(name) for name in METRICS), "FVD"]
    rows: list[list[object]] = []
    for arm in [*(a for a in REFERENCES if a in results.by_arm), *results.arms]:
        cells: list[object] = [{**REFERENCES, **MEANING}[arm]]
        cells += [_score(results.mean(arm, name), name) for name in METRICS]
        fvds = list(results.fvds(arm).values())
        rows.append([*cells, f"{np.mean(fvds):.0f}" if fvds else "n/a"])
    lines += ["## Scores", "", markdown_table(header, rows), "", _noise(results), ""]
    rows, of_sets = [], {arm: results.fvd_difference(arm) for arm in results.arms}
    for arm in results.arms:
        if arm != "latent":
            cells = [MEANING[arm], *(_marked(name, results.difference(arm, name)) for name in METRICS)]
            fvd = of_sets[arm]
            rows.append([*cells, "n/a" if fvd is None else with_interval(fvd, 0)])
    if not any(of_sets.values()):  # of one seed there is no difference to show
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines += ["## Difference to latent-only", "", markdown_table(header, rows), ""]
    if results.cost:
        rows = []
        for arm in results.cost.settings["arms"]:
            time = results.relative_time(arm)
            rows.append([MEANING[arm], "n/a" if time is None else with_interval(time, 2),
                         _number(results.peak_mib(arm), 0)])  # fmt: skip
        lines += ["## One step", "", markdown_table(["arm", "time / exact", "peak MiB"], rows), ""]
        lines += ["`full` has the gradient of `exact`, so it was timed but not trained again.", ""]
    lines += ["## Verdicts", "", *(f"- {line}" for line in verdicts(results))]
    return "\n".join(lines) + "\n"


def verdicts(results: TaskResults) -> list[str]:
    """What the numbers say about the paper's two claims, metric by metric."""
    lines = []
    arm = "exact" if "exact" in results.arms else next((a for a in reversed(results.arms) if a != "latent"), None)
    if arm is None:
        return ["Only the latent arm was run: nothing to compare."]
    for claimed, word in (("holds", "better"), ("fails", "worse"), ("undecided", "no difference beyond the noise")):
        names = [NAMES[m] for m in METRICS if results.difference(arm, m) and pixels_win(results, arm, m) == claimed]
        if names:
            lines.append(f"Pixel loss ({MEANING[arm]}) against latent-only, {word}: {', '.join(names)}.")
    if "exact" in results.arms:
        sides = [better(m, d) for m in METRICS for _, d in distance_matters(results, m)]
        lines.append(
            f"Does the distance matter? Of {len(sides)} comparisons of a truncated arm with the exact gradient, "
            f"{sides.count(False)} are worse and {sides.count(True)} better beyond their interval."
        )
        if same := same_as_exact(results):
            listed = ", ".join(MEANING[a] for a in same)
            lines.append(f"So few frame groups that these are the exact gradient, and are not counted: {listed}.")
        kept = [f"{MEANING[a]} {low:.0f} to {high:.0f} %" for a, (low, high) in shares_of_the_gain(results).items()]
        if kept:
            listed = ", ".join(kept)
            lines.append(f"Share of the exact gradient's gain that is kept, over the metrics that it wins: {listed}.")
        if whole := [c for c in claims(results) if c.statement.startswith(LITTLE)]:
            counts = Counter(c.verdict for c in whole)
            listed = ", ".join(f"{word} in {counts[word]}" for word in get_args(Verdict) if counts[word])
            lines.append(f"*{LITTLE}*: {listed} of the {len(whole)} metrics that it wins.")
    return lines


def overview(all_results: Sequence[TaskResults], command: str) -> str:
    """``README.md`` of the folder: all tasks at a glance."""
    rows = []
    for results in all_results:
        for arm in results.arms:
            if arm == "latent":
                continue
            cells: list[object] = [results.task, MEANING[arm]]
            for metric in ("psnr", "lpips-vgg", "dists"):
                cells.append(_marked(metric, results.difference(arm, metric)))
            time = results.relative_time(arm)
            rows.append([*cells, "n/a" if time is None else f"{time[0]:.2f}", _number(results.peak_mib(arm), 0)])
    header = ["task", "arm", "PSNR dB, minus latent", "LPIPS (VGG), minus latent", "DISTS, minus latent",
              "time / exact", "peak MiB"]  # fmt: skip
    lines = ["# End tasks (paper: Sec. 4, Tables 1 to 4)", "", f"Command: `{command}`", ""]
    lines += [markdown_table(header, rows), "", EXPLANATION.rstrip(), ""]
    for results in all_results:
        lines += [f"## [{TABLES[results.task]}]({results.task}.md)", "", *(f"- {x}" for x in verdicts(results)), ""]
    return "\n".join(lines).rstrip() + "\n"


TUNED = """\
In driving video a loss on pixels trains the decoder, too, which a loss in latent space cannot. Two controls tell the
two apart: a latent loss whose decoder is tuned, for as many steps, to draw the targets from their own latents; and
the loss on pixels with the decoder as it is. Settings are those of the [end tasks](../tasks/README.md), with fewer
seeds; seeds and test clips are drawn independently for an interval, and with so few seeds it is a narrow one.
"""
TUNED_METRICS = ("psnr", "ssim", "lpips-alex", "lpips-vgg", "dists")


def controls(results: TaskResults) -> str:
    """Page of the controls of a task whose decoder trains, as Markdown."""
    arms = [a for a in results.arms if a in ("latent-tuned", "exact-frozen", "chop-1", "exact")]
    header = ["arm", *(f"{head(m)}, minus latent" for m in TUNED_METRICS)]
    rows = [[MEANING[a], *(_marked(m, results.difference(a, m)) for m in TUNED_METRICS)] for a in arms]
    lines = ["# Is the gain the loss's, or the trained decoder's?", "", TUNED.rstrip(), ""]
    lines += [_settings(results), "", markdown_table(header, rows), ""]
    for metric in TUNED_METRICS:
        found = results.difference("exact", metric, "latent-tuned")
        if found is not None:
            words = {None: "no better and no worse than", True: "better than", False: "worse than"}
            side = words[better(metric, found)]
            difference = with_interval(found, DIGITS[metric])
            lines.append(f"- {NAMES[metric]}: the exact gradient is {side} the tuned decoder ({difference}).")
    return "\n".join(lines) + "\n"


def figure(
    all_results: Sequence[TaskResults], path: Path, metrics: Sequence[str] = ("psnr", "lpips-vgg", "dists")
) -> Path:
    """Differences to latent-only with intervals: a row a task, a column a metric, a bar an arm."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    shown = [r for r in all_results if len(r.arms) > 1]
    arms = [a for a in ARMS if a != "latent" and any(a in r.arms for r in shown)]
    figure, axes = pyplot.subplots(
        len(shown), len(metrics), figsize=(3.6 * len(metrics) + 1.4, 0.3 * len(arms) * len(shown) + 0.75 * len(shown)),
        squeeze=False, layout="constrained", sharey=True,
    )  # fmt: skip
    for row, results in enumerate(shown):
        for column, metric in enumerate(metrics):
            axis = axes[row][column]
            axis.axvline(0, color="0.5", linewidth=0.8)
            for k, arm in enumerate(arms):
                difference = results.difference(arm, metric)
                if difference is None:
                    continue
                mean, low, high = difference
                side = better(metric, difference)
                color = "0.55" if side is None else "tab:green" if side else "tab:red"
                axis.errorbar(
                    mean, k, xerr=[[mean - low], [high - mean]], fmt="o", markersize=4, color=color, capsize=2
                )
            axis.set_yticks(range(len(arms)), [MEANING[a] for a in arms], fontsize=7)
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.tick_params(axis="x", labelsize=7)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            arrow = "higher is better" if METRICS[metric].higher_is_better else "lower is better"
            if row == len(shown) - 1:
                axis.set_xlabel(f"{head(metric)} minus latent-only ({arrow})", fontsize=8)
            if column == 0:
                axis.set_ylabel(results.task, fontsize=9)
    figure.suptitle(
        "Pixel losses against latent-only training: paired differences, 95 % intervals\n"
        "green: better, red: worse, grey: no difference beyond the interval", fontsize=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def picture_grid(path: Path, task: str, clips: Sequence[int], videos: Mapping[str, Tensor]) -> Path:
    """Input, arms and target side by side.

    Args:
        videos: name -> [clips, 3, frames, H, W] in [-1, 1].
    """
    rows = [{name: video[k] for name, video in videos.items()} for k in clips]
    return side_by_side(path, rows, f"{TABLES[task]}: test clips", shown=2)


def _settings(results: TaskResults) -> str:
    record = next(iter(results.by_arm[results.arms[-1]])) if results.arms else results.records[0]
    s, p = record.settings, record.provenance
    seeds = len(results.by_arm.get(results.arms[-1], [])) if results.arms else 0
    width, height = s["size"][1], s["size"][0]
    code = f"commit {(p['commit'] or 'unknown')[:10]}{' with local changes' if p['dirty'] else ''}"
    return (
        f"{seeds} seeds, {s['test_clips']} test clips of {s['frames']} frames of {height}x{width}, {s['clips']} "
        f"training clips; warm-up in latent space, then {s['steps']} steps of {s['batch']} clips at rate "
        f"{s['rate']:g}, {s['mixed_precision'].replace('no', 'float32')}; VAE {s['vae']}. Perceptual losses saw every "
        f"{s['perceptual_stride']}th frame of a group, in turn. Measured on {p['device']} ({p['threads']} threads), "
        f"torch {p['torch']}, diffusers {p['diffusers']}, {code}, {p['date'][:10]}: `{p['command'].strip()}`."
    )


def _noise(results: TaskResults) -> str:
    noises = [r.metrics["fvd_split_half_noise"] for rs in results.by_arm.values() for r in rs]
    known = [n for n in noises if n is not None]
    missing: dict[str, Any] = {}
    for records in results.by_arm.values():
        missing |= records[0].metrics["missing"]
    seeds = max((len(results.fvds(arm)) for arm in results.arms), default=0)
    halves = (
        f"FVD between two halves of the targets: {np.mean(known or 0):.0f}. It was computed for {seeds} of the seeds."
    )
    lines = [halves if known else "FVD: n/a."]
    lines += [f"{name} is n/a: {how}" for name, how in missing.items()]
    return " ".join(lines)


def head(metric: str) -> str:
    """A column's name and unit."""
    unit = METRICS[metric].unit or (f"x {SHOWN_TIMES[metric]}" if metric in SHOWN_TIMES else "")
    return NAMES[metric] + (f" {unit}" if unit else "")


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _score(value: float | None, metric: str) -> str:
    return _number(None if value is None else value * SHOWN_TIMES.get(metric, 1), DIGITS[metric])


def _marked(metric: str, difference: Sequence[float] | None) -> str:
    if difference is None:
        return "n/a"
    text = with_interval([x * SHOWN_TIMES.get(metric, 1) for x in difference], DIGITS[metric])
    side = better(metric, difference)
    return text if side is None else f"**{text}**" if side else f"_{text}_"
