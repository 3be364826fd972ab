"""Peak and time of every method on one card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from bench.gpu.results import GIB, TITLES, case_of, compared
from suite.records import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def figure(records: list[Record], predicted: Mapping[str, float], path: Path) -> None:
    """Peak and time of every method, a row for each video; crosses: predicted peaks; hatched: only a first call."""
    shown = compared(records)
    sizes = [len(m) for m in shown.values()]
    fig, axes = plt.subplots(
        len(shown), 2, figsize=(13, 0.9 * len(shown) + 0.33 * sum(sizes)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": [n + 2 for n in sizes]},
    )  # fmt: skip
    for (memory, time), (row, measured) in zip(axes, shown.items(), strict=True):
        names = [
            r.settings["strategy"] + ("" if r.settings["call"] == "frame_loss" else f", {r.settings['call']}")
            for r in measured
        ]
        places = range(len(measured))
        memory.barh(places, [r.metrics.get("allocated_peak_bytes", 0) / GIB for r in measured], color="tab:blue")
        for place, record in zip(places, measured, strict=True):
            case = case_of(record)
            if case is not None and record.settings["call"] == "frame_loss" and case.name in predicted:
                memory.plot(predicted[case.name] / GIB, place, "x", color="k")
            if record.metrics.get("out_of_memory"):
                memory.text(0, place, " out of memory", va="center")
        for place, record in zip(places, measured, strict=True):
            seconds = record.metrics.get("seconds")
            if seconds:
                time.barh(place, min(seconds), color="tab:orange")
            else:
                time.barh(
                    place, record.metrics.get("first_s", 0.0), color="moccasin", hatch="//", edgecolor="tab:orange"
                )
        s = measured[0].settings
        title = f"{TITLES.get(row, row)}\n{s['frames']} frames of {s['height']}x{s['width']}"
        memory.set(xlabel="peak, GiB (cross: predicted)", title=title)
        time.set(xlabel="seconds a call (hatched: a first call, which pins memory)", title="")
        memory.set_yticks(places, names, fontsize=8)
        time.set_yticks(places, [""] * len(names))
        for axis in (memory, time):
            axis.invert_yaxis()
            axis.margins(x=0.08)
    fig.suptitle(f"{records[0].provenance['device']}, bfloat16, MSE, random weights")
    fig.savefig(path, dpi=110)
    plt.close(fig)
