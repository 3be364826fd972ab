"""The records of a benchmark, read back: what tables, figures and targets are made from, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.cases import Case, Method
from suite.records import Record, read_record

KINDS = ("memory", "time", "prediction", "gradient_error")
"""Folders of records."""


class Peak(NamedTuple):
    """Device memory beyond weights, latents and target."""

    bytes: float
    kind: Literal["measured", "predicted"]
    total_bytes: float
    """With weights and latents."""


class Results:
    """Records of the cases, by kind and case; what was not measured is simply not there."""

    def __init__(self, folder: Path, cases: Sequence[Case]) -> None:
        self.folder, self.cases = folder, cases
        self.records: dict[tuple[str, str], Record] = {}
        for kind in KINDS:
            for case in cases:
                try:
                    record = read_record(folder / kind / f"{case.name}.json")
                except ValueError:
                    continue
                if record.settings == case.settings():
                    self.records[kind, case.name] = record

    def metrics(self, kind: str, case: Case) -> dict[str, Any] | None:
        record = self.records.get((kind, case.name))
        return record.metrics if record else None

    def knows(self, video: Case) -> bool:
        """Whether there is a record of its VAE, size and loss."""
        return any((k, c.name) in self.records for k in KINDS for c in self.cases if _alike(c, video))

    def ran_out(self, case: Case) -> bool:
        """Whether the case was tried and did not fit."""
        return any((self.metrics(kind, case) or {}).get("out_of_memory") for kind in ("memory", "time"))

    def measured(self, case: Case) -> Peak | None:
        m = self.metrics("memory", case)
        if m is None or m["out_of_memory"]:
            return None
        return Peak(m["peak_bytes"], "measured", m["peak_bytes"] + m["weights_bytes"] + m["latents_bytes"])

    def predicted(self, case: Case) -> Peak | None:
        m = self.metrics("prediction", case)
        return None if m is None or m["peak_bytes"] is None else Peak(m["peak_bytes"], "predicted", m["device_bytes"])

    def peak(self, case: Case) -> Peak | None:
        """As measured; else as predicted."""
        return self.measured(case) or self.predicted(case)

    def predicted_over_measured(self, case: Case) -> float | None:
        predicted, measured = self.predicted(case), self.measured(case)
        return predicted.bytes / measured.bytes if predicted and measured else None

    def time(self, case: Case, reference: str = "Full()") -> list[float] | None:
        """(mean, low, high) of the ratio to full back-propagation; None also where the reference was another."""
        m = self.metrics("time", case)
        return None if m is None or m["out_of_memory"] or m["reference"] != reference else m["ratio_to_reference"]

    def reference(self, video: Case) -> str:
        """What the times of a video are ratios to: ``Full()``, or where it does not fit the first that does."""
        found = [self.metrics("time", c) for c in self.cases if c.video == video]
        return next((m["reference"] for m in found if m and not m["out_of_memory"]), "Full()")

    def seconds(self, case: Case) -> float | None:
        m = self.metrics("time", case)
        return None if m is None or m["out_of_memory"] else m["seconds_median"]

    def error(self, case: Case) -> list[float] | None:
        """(mean, low, high) of the relative gradient error; None for random weights."""
        m = self.metrics("gradient_error", case)
        return m["relative_error"] if m else None


def frames_of(cases: Sequence[Case], video: Case) -> list[int]:
    """The frame counts of a VAE, size and loss."""
    return sorted({c.frames for c in cases if _alike(c, video)})


def methods_of(cases: Sequence[Case], video: Case) -> list[Method]:
    """The strategies and baselines of a VAE, size and loss, in order."""
    return list(dict.fromkeys(c.strategy for c in cases if _alike(c, video)))


def _alike(case: Case, video: Case) -> bool:
    return replace(case.video, frames=video.frames) == video


def groups_of_videos(cases: Sequence[Case]) -> list[Case]:
    """One case per VAE, size and loss."""
    return list({replace(c.video, frames=0): c.video for c in cases}.values())


def as_bytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
