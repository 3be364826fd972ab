"""Tables, verdicts and pictures of the end tasks, from the records of ``bench.tasks.protocol``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from bench.tasks.pictures import side_by_side
from bench.tasks.training.arms import ARMS, MEANING
from suite.bootstrap import mean_interval
from suite.claims import Verdict
from suite.metrics import METRICS
from suite.records import Record, read_records
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")

TABLES = {
    "super-resolution": "Table 1: video super-resolution",
    "artifact-removal": "Table 2: artifact removal in novel-view synthesis",
    "inpainting": "Table 3: video inpainting, central half",
    "inpainting-objects": "Table 3: video inpainting, moving objects",
    "driving": "Table 4: controlled driving video",
}
REFERENCES = {
    "input": "input, untouched",
    "autoencoder": "target, encoded and decoded",
    "warm-up": "warm-up (the start)",
}
DIGITS = {"psnr": 2, "ssim": 3, "lpips-alex": 3, "lpips-vgg": 3, "dists": 3, "flickering": 4, "warping-error": 2}
SHOWN_TIMES = {"warping-error": 1000}
"""Too small to be read as it is."""
MIB = 2**20
EXPLANATION = """\
Every arm fine-tunes the same backbone from the same start on the same clips in the same order for the same number of
steps; seeds differ in the backbone's first weights, its warm-up and the order. Scores: mean over seeds and test clips,
which no training has seen. Differences: arm minus latent-only, paired by seed and clip, with 95 % bootstrap interval
(seeds are drawn, then clips within them); **bold** where the interval excludes 0 in the arm's favour, _slanted_ where
it excludes 0 against it. FVD on so few clips is mostly noise: under the scores stands the FVD between two halves of the
targets, and only its differences, paired by seed, mean anything; with so few seeds none is marked. Blur raises
flickering (higher is smoother) and lowers the warping error, so a sharper video scores worse on both: compare with the
row of the target, encoded and decoded, which is also what a perfect loss in latent space would give. Time and peak
memory of one step (backbone, decoder and loss) were measured apart, arms interleaved.
"""


@dataclass
class TaskResults:
    """The records of one task."""

    task: str
    records: Sequence[Record]

    @cached_property
    def by_arm(self) -> Mapping[str, list[Record]]:
        """arm -> records in order of seed."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if "per_clip" in record.metrics:
                found.setdefault(str(record.settings["arm"]), []).append(record)
        return {arm: sorted(rs, key=lambda r: r.settings["seed"] or 0) for arm, rs in found.items()}

    @property
    def arms(self) -> list[str]:
        """Trained arms, in the order of ``ARMS``."""
        return [arm for arm in ARMS if arm in self.by_arm]

    @cached_property
    def cost(self) -> Record | None:
        return next((r for r in self.records if "step_seconds" in r.metrics), None)

    def scores(self, arm: str, metric: str) -> dict[tuple[int | None, int], float]:
        """(seed, clip) -> score."""
        values = {}
        for record in self.by_arm.get(arm, []):
            for k, value in enumerate(record.metrics["per_clip"].get(metric) or []):
                if value is not None:
                    values[record.settings["seed"], k] = float(value)
        return values

    def mean(self, arm: str, metric: str) -> float | None:
        values = list(self.scores(arm, metric).values())
        return sum(values) / len(values) if values else None

    def difference(self, arm: str, metric: str, reference: str = "latent") -> tuple[float, float, float] | None:
        """(mean, low, high) of arm minus reference, paired by seed and clip; None without common pairs."""
        ours, theirs = self.scores(arm, metric), self.scores(reference, metric)
        common = sorted(set(ours) & set(theirs))
        if not common:
            return None
        return mean_interval([ours[k] - theirs[k] for k in common], clusters=[seed for seed, _ in common])

    def fvds(self, arm: str) -> dict[int | None, float]:
        """seed -> FVD of its test clips; it may have been computed for some seeds only."""
        found = {r.settings["seed"]: r.metrics.get("fvd") for r in self.by_arm.get(arm, [])}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def fvd_difference(self, arm: str, reference: str = "latent") -> tuple[float, float, float] | None:
        """(mean, low, high) of arm minus reference, paired by seed; None with fewer than two common seeds."""
        ours, theirs = self.fvds(arm), self.fvds(reference)
        common = [seed for seed in ours if seed in theirs]
        return mean_interval([ours[seed] - theirs[seed] for seed in common]) if len(common) > 1 else None

    def relative_time(self, arm: str, reference: str = "exact") -> tuple[float, float, float] | None:
        """Time of a step as a ratio to the reference's in the same round."""
        seconds = self.cost.metrics["step_seconds"] if self.cost else {}
        if arm not in seconds or reference not in seconds:
            return None
        return mean_interval([a / b for a, b in zip(seconds[arm], seconds[reference], strict=True)])

    def peak_mib(self, arm: str) -> float | None:
        peak = self.cost.metrics["peak_bytes"].get(arm) if self.cost else None
        return None if peak is None else peak / MIB


def results_of(folder: Path, tasks: Collection[str] = tuple(TABLES)) -> list[TaskResults]:
    """Those of the tasks that have records in a folder, in the order given (default: the paper's)."""
    records: dict[str, list[Record]] = {}
    for record in read_records(folder):
        if record.settings.get("task") in tasks:
            records.setdefault(str(record.settings["task"]), []).append(record)
    return [TaskResults(task, records[task]) for task in tasks if task in records]


def better(metric: str, difference: Sequence[float]) -> bool | None:
    """Whether an interval lies on the better side of 0; None where it holds 0."""
    _, low, high = difference
    if low <= 0 <= high:
        return None
    return (low > 0) == METRICS[metric].higher_is_better


def pixels_win(results: TaskResults, arm: str, metric: str) -> Verdict:
    """ "A pixel loss through the decoder beats latent-only": for one arm and metric."""
    difference = results.difference(arm, metric)
    found = None if difference is None else better(metric, difference)
    return "undecided" if found is None else "holds" if found else "fails"


def distance_matters(results: TaskResults, metric: str) -> list[tuple[str, tuple[float, float, float]]]:
    """Each truncated arm minus the exact gradient; not those whose distance reaches over all groups of the video."""
    same = same_as_exact(results)
    arms = [a for a in results.arms if a.startswith(("chop-", "block-")) and a not in same]
    found = [(arm, results.difference(arm, metric, "exact")) for arm in arms]
    return [(arm, d) for arm, d in found if d is not None]


def same_as_exact(results: TaskResults) -> list[str]:
    """Truncated arms with the very scores of the exact gradient: videos with few frame groups have no more distance."""
    exact = {name: results.scores("exact", name) for name in METRICS}
    cut = [a for a in results.arms if a.startswith(("chop-", "block-"))]
    return [a for a in cut if exact["psnr"] and all(results.scores(a, name) == exact[name] for name in METRICS)]


def shares_of_the_gain(results: TaskResults) -> dict[str, tuple[float, float]]:
    """Truncated arm -> smallest and largest share, in percent, of the exact gradient's mean gain over latent-only, over
    the metrics in which that gain is beyond its interval.
    """
    shares: dict[str, list[float]] = {}
    for metric in METRICS:
        if pixels_win(results, "exact", metric) != "holds":
            continue
        exact = results.difference("exact", metric)
        for arm, _ in distance_matters(results, metric):
            cut = results.difference(arm, metric)
            if exact and cut:
                shares.setdefault(arm, []).append(100 * cut[0] / exact[0])
    return {arm: (min(found), max(found)) for arm, found in shares.items()}


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
        names = [_name(m) for m in METRICS if results.difference(arm, m) and pixels_win(results, arm, m) == claimed]
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
    lines = ["# End tasks (paper: Sec. 4, Tables 1 to 4)", "", f"Command: `{command}`", "", EXPLANATION.rstrip(), ""]
    lines += [markdown_table(header, rows), ""]
    for results in all_results:
        lines += [f"## [{TABLES[results.task]}]({results.task}.md)", "", *(f"- {x}" for x in verdicts(results)), ""]
    return "\n".join(lines).rstrip() + "\n"


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
    return _name(metric) + (f" {unit}" if unit else "")


def _name(metric: str) -> str:
    return {"psnr": "PSNR", "ssim": "SSIM", "lpips-alex": "LPIPS (Alex)", "lpips-vgg": "LPIPS (VGG)", "dists": "DISTS",
            "flickering": "flickering", "warping-error": "warping error"}[metric]  # fmt: skip


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
