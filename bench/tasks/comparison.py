"""The records of the end tasks, read back and compared: arms paired by seed and clip, and what follows from that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.tasks.training.arms import ARMS
from suite.bootstrap import crossed_interval, mean_interval
from suite.claims import Claim, Verdict
from suite.metrics import METRICS
from suite.records import Record, read_records

TABLES = {
    "super-resolution": "Table 1: video super-resolution",
    "artifact-removal": "Table 2: artifact removal in novel-view synthesis",
    "inpainting": "Table 3: video inpainting, central half",
    "inpainting-objects": "Table 3: video inpainting, moving objects",
    "driving": "Table 4: controlled driving video",
}
NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips-alex": "LPIPS (Alex)",
    "lpips-vgg": "LPIPS (VGG)",
    "dists": "DISTS",
    "flickering": "flickering",
    "warping-error": "warping error",
}
"""Of the metrics, as people write them."""
KEPT = 0.9
"""Share of the exact gradient's gain that is all but everything; as in ``analysis/training_bias.py``."""
LITTLE = f"The truncation distance matters little: D = 1 keeps at least {100 * KEPT:.0f} % of the exact gradient's gain"
MIB = 2**20


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
        """(mean, low, high) of arm minus reference, paired by seed and clip, which cross; None without common pairs."""
        ours, theirs = self.scores(arm, metric), self.scores(reference, metric)
        common = sorted(set(ours) & set(theirs))
        return crossed_interval({k: ours[k] - theirs[k] for k in common}) if common else None

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


def claims(results: TaskResults) -> list[Claim]:
    """The paper's two statements on the end tasks, metric by metric; none where an arm was not trained."""
    found = []
    source = TABLES[results.task].partition(":")[0]
    for metric in METRICS:
        where, gain = f"in {NAMES[metric]} ({results.task})", results.difference("exact", metric)
        if gain is None:
            continue
        wins = pixels_win(results, "exact", metric)
        statement = f"A loss on pixels through the decoder beats latent-only training {where}."
        found.append(Claim(statement, source, wins, f"exact minus latent-only {_short(gain)}"))
        ours = results.difference("chop-1", metric)
        if ours and wins == "holds" and "chop-1" not in same_as_exact(results):
            beyond = _beyond(results, "chop-1", metric)
            verdict: Verdict = "undecided" if beyond is None else "holds" if beyond else "fails"
            evidence = f"D = 1 keeps {100 * ours[0] / gain[0]:.0f} %"
            found.append(Claim(f"{LITTLE} {where}.", source, verdict, evidence))
    return found


def _beyond(results: TaskResults, arm: str, metric: str) -> bool | None:
    """Whether an arm keeps over ``KEPT`` of the exact gradient's gain over latent-only, paired; None: undecided."""
    ours, exact, latent = (results.scores(a, metric) for a in (arm, "exact", "latent"))
    common = sorted(set(ours) & set(exact) & set(latent))
    return better(metric, crossed_interval({k: ours[k] - latent[k] - KEPT * (exact[k] - latent[k]) for k in common}))


def _short(triple: Sequence[float]) -> str:
    return "{:.2g} [{:.2g}, {:.2g}]".format(*triple)
