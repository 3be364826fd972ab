"""The page and the figures of all cards, from the records and nothing else: ``python -m bench.gpu.page``.

Before that it predicts, on tensors without data, the peak of every measured video for which nothing is predicted yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.figure import figure
from bench.gpu.results import GIB, TITLES, cards, case_of, compared, predict_missing, predictions, tables
from suite.command_line import run_main
from suite.records import ROOT, Record
from suite.tables import markdown_table

INTRODUCTION = """\
# Measured on GPUs

The published decoders with random weights, in bfloat16, batch 1, MSE; memory and time do not depend on the weights, and
of an error of truncation random weights say nothing. `python -m bench.gpu` measures, `python -m bench.gpu.page` writes
this page; [docs/gpu.md](../../docs/gpu.md) says how to add a card.

- *peak*: what the call adds to weights, latents and target, by the allocator's count (GiB); *p/m*: predicted by
  `chopgrad plan` over measured. *reserved*: all that PyTorch's allocator held. *pinned*: host memory, at most.
- *s*: least of the timed calls. *first*: the first call, which also pins host memory. *ratio*: median of time over that
  of the first method of the table, timed right before. *passes*: time over that of one forward pass without a graph.
- *off float32*: relative difference of an exact gradient from that in float32. *off first*: from that of the first
  method of the table. *repeat*: between two calls of the method itself, because a GPU adds in no fixed order.
"""


@dataclass
class Config:
    """Settings of the page."""

    results: Path = ROOT / "results" / "gpu"
    """Folder of the cards' folders."""
    predict: bool = True
    """Predict what no prediction is there for; some seconds a video."""


def page(results: Path) -> str:
    """The Markdown text."""
    parts = [INTRODUCTION]
    for name, records in cards(results).items():
        predicted = predictions(results, name)
        parts.append(f"## {records[0].provenance['device']}\n\n{_made_by(records)}\n")
        parts += [_card(r) for r in records if r.settings["row"] == "card"]
        parts += [_tests(r) for r in records if r.settings["row"] == "tests"]
        for row, measured in tables(records).items():
            s = measured[0].settings
            video = f"{s['frames']} frames of {s['height']}x{s['width']}"
            parts.append(f"### {TITLES.get(row, row)}: {video}\n")
            parts.append(_calls(measured[0]) if row == "repeated" else _table(measured, predicted) + "\n")
        if compared(records):
            parts.append(f"![Peak memory and time on this card]({name}.png)\n")
    return "\n".join(parts)


def _made_by(records: list[Record]) -> str:
    p = records[0].provenance
    commits = sorted({str(r.provenance["commit"])[:10] for r in records})
    commands = sorted({f"`{r.provenance['command']}`" for r in records})
    notes = sorted({r.provenance["note"] for r in records if "note" in r.provenance})
    told = f"PyTorch {p['torch']}, diffusers {p['diffusers']}, {p['date'][:10]}, commit {', '.join(commits)}"
    return "\n".join([f"{told}: {'; '.join(commands)}.", *notes])


def _card(record: Record) -> str:
    m = record.metrics
    facts = [
        f"Pinning {m['pinning_gib_per_s']:.1f} GiB/s, to the device {m['to_device_gib_per_s']:.0f}, to the host "
        f"{m['to_host_gib_per_s']:.0f}, both at once {m['both_ways_gib_per_s']:.0f} in sum."
    ]
    if m.get("fast_pinning_gib_per_s"):
        facts.append(f"Pinning by eight threads {m['fast_pinning_gib_per_s']:.1f} GiB/s.")
    rows = [
        (
            f"{c['channels']} channels, {c['layout'].replace('_format', '')}",
            c["forward_tflop_per_s"],
            c["backward_tflop_per_s"],
            "" if c["workspace_bytes"] is None else f"{c['workspace_bytes'] / 2**20:.0f} MiB",
        )
        for c in m["convolutions"]
    ]
    header = ("3x3x3 convolution", "TFLOP/s forwards", "backwards", "workspace")
    return " ".join(facts) + "\n\n" + markdown_table(header, rows) + "\n"


def _tests(record: Record) -> str:
    m = record.metrics
    counts = ", ".join(
        f"{m[word]} {word}" for word in ("passed", "failed", "error", "skipped", "unfinished") if m.get(word)
    )
    return f"`{record.settings['command']}` on this card: {counts or 'stopped before its end'}.\n"


COLUMNS: Mapping[str, Any] = {
    "peak": lambda m: m["allocated_peak_bytes"] / GIB,
    "reserved": lambda m: m["reserved_peak_bytes"] / GIB,
    "pinned": lambda m: m["pinned_peak_bytes"] / GIB,
    "first": lambda m: m["first_s"],
    "s": lambda m: min(m["seconds"]),
    "ratio": lambda m: m["time_ratio"],
    "passes": lambda m: min(m["seconds"]) / m["forward_s"],
    "every": lambda m: m["every"],
    "off float32": lambda m: f"{m['error_to_float32']:.1e}",
    "off first": lambda m: f"{m['difference_from_reference']:.1e}",
    "repeat": lambda m: f"{m['repeat_difference']:.1e}",
}


def _table(measured: list[Record], predicted: Mapping[str, float]) -> str:
    """A line for each method; columns of which nothing is known are left out."""
    lines = []
    for record in measured:
        m, call = record.metrics, record.settings["call"]
        line: dict[str, object] = {
            "strategy": record.settings["strategy"] + ("" if call == "frame_loss" else f", {call}")
        }
        if m.get("out_of_memory"):
            line["peak"] = "out of memory"
        case = case_of(record)
        truncated = record.settings["strategy"].startswith(("Chop", "Sampled"))
        for name, value in COLUMNS.items():
            found = None if truncated and name.startswith("off") else _value(value, m)
            line[name] = line.get(name, "") if found is None else found
            if name == "peak" and case is not None and not record.settings["channels_last"]:
                line["p/m"] = _over(predicted.get(case.name), m) if call == "frame_loss" else ""
        lines.append(line)
    names = [k for k in lines[0] if any(line.get(k) not in ("", None) for line in lines)]
    stopped = [f"`{r.settings['strategy']}`: {r.metrics['stopped']}." for r in measured if "stopped" in r.metrics]
    return "\n".join([markdown_table(names, [[line.get(k, "") for k in names] for line in lines]), *stopped])


def _value(column: Any, metrics: Mapping[str, Any]) -> object | None:
    try:
        found = column(metrics)
    except (KeyError, TypeError, ValueError):  # not measured, or not of this method
        return None
    return f"{found:.2f}" if isinstance(found, float) else found


def _over(predicted: float | None, metrics: Mapping[str, Any]) -> str:
    measured = metrics.get("allocated_peak_bytes")
    return "" if predicted is None or not measured else f"{predicted / measured:.3f}"


def _calls(record: Record) -> str:
    if record.metrics.get("out_of_memory"):
        return f"`{record.settings['strategy']}`: out of memory.\n"
    reserved = [x / GIB for x in record.metrics["reserved_after_call_bytes"]]
    grows = next((k for k, x in enumerate(reserved) if x >= max(reserved) - 2**21 / GIB), 0)
    return (
        f"`{record.settings['strategy']}`, {len(reserved)} calls: {reserved[0]:.2f} GiB reserved after the first, "
        f"{reserved[-1]:.2f} after the last; it stopped growing at call {grows + 1}.\n"
    )


def main(config: Config) -> None:
    if not cards(config.results):
        raise ValueError(f"--results must hold a folder of records for each card; '{config.results.name}' has none.")
    if config.predict:
        print(f"Predicted: {predict_missing(config.results)} cases")
    for name, records in cards(config.results).items():
        if compared(records):
            figure(records, predictions(config.results, name), config.results / f"{name}.png")
    (config.results / "README.md").write_text(page(config.results))
    print(f"Written: {config.results.name}/README.md and a figure for each card")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
