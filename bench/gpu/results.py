"""The records of all cards, and what was predicted for the same cases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.cases import Case, plain
from bench.gpu.rows import methods_by_label
from bench.predict import predict_all
from suite.records import Record, provenance, read_records, write_record

GIB = 2**30
PREDICTED = "predicted"
"""Folder of the predictions, beside those of the cards; in it one for each card, of the code that ran there."""
TITLES = {
    "wan-short": "Wan 2.1, short enough for full back-propagation",
    "wan-medium": "Wan 2.1, the longest video whose full graph fits a large card",
    "wan-long": "Wan 2.1, a long video",
    "wan-720p": "Wan 2.1 in 720p",
    "calls": "One loss, four ways to call the decoder",
    "cogvideox-long": "CogVideoX, a long video",
    "cogvideox-short": "CogVideoX, two or one groups, which D = 1 does not truncate",
    "wan2.2-short": "Wan 2.2, short enough for full back-propagation",
    "repeated": "Memory that the allocator holds, call after call",
    "channels-last": "Wan 2.1 with channels-last weights and latents",
    "saved-on-cpu": "PyTorch's own way to save activations on the host",
}


def cards(results: Path) -> dict[str, list[Record]]:
    """Records of each card, by the name of its folder."""
    folders = sorted(p for p in results.iterdir() if p.is_dir() and p.name != PREDICTED) if results.is_dir() else []
    found = {folder.name: list(read_records(folder)) for folder in folders}
    return {name: records for name, records in found.items() if records}


def tables(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Measured cases by row, in the order of ``TITLES``; within a row that with the first method first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if "strategy" in record.settings:
            found.setdefault(record.settings["row"], []).append(record)
    order = [*TITLES, *(row for row in found if row not in TITLES)]
    return {row: sorted(found[row], key=_place) for row in order if row in found}


def _place(record: Record) -> tuple[bool, float]:
    """The reference first, then by memory."""
    return record.metrics.get("reference") is not None, -record.metrics.get("allocated_peak_bytes", 0)


def case_of(record: Record) -> Case | None:
    """The measured case; None where its method is none of today's."""
    s = record.settings
    method = methods_by_label().get(s["strategy"])
    if method is None:
        return None
    return Case(s["vae"], s["frames"], s["height"], s["width"], method, s["loss"], s["dtype"], "cuda")


def predictions(results: Path, card: str) -> dict[str, float]:
    """Name of a case -> predicted peak in bytes.

    Args:
        card: name of its folder.
    """
    found = read_records(results / PREDICTED / card)
    return {r.path.stem: r.metrics["peak_bytes"] for r in found if r.metrics["peak_bytes"] is not None}


def predict_missing(results: Path) -> int:
    """Write a prediction for each measured case without one; returns how many.

    Not for records with a note, which are of earlier code, nor of ``Exact()``, whose form depends on the card.
    """
    made_by, count = provenance("cpu"), 0
    for card, records in cards(results).items():
        there = predictions(results, card)
        wanted: dict[Case, dict[str, Case]] = {}
        for record in records:
            is_streamed = record.settings.get("call") == "frame_loss" and not record.settings.get("channels_last")
            case = case_of(record) if is_streamed and "note" not in record.provenance else None
            if case is None or getattr(plain(case.strategy), "is_automatic", False):
                continue
            if case.name not in there and case.dtype == "bfloat16":
                wanted.setdefault(case.video, {})[case.name] = case
        for same_video in wanted.values():
            cases = list(same_video.values())
            for name, metrics in predict_all(cases, cases[0]).items():
                file = results / PREDICTED / card / f"{name}.json"
                write_record(file, same_video[name].settings(), metrics, made_by)
                count += 1
    return count


def compared(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The rows with something to compare."""
    return {row: m for row, m in tables(records).items() if row != "repeated" and len(m) > 1}
