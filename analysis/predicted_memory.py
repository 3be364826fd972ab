"""Peak memory of every strategy on the published architectures, predicted without a GPU:
``python analysis/predicted_memory.py`` (the memory half of Fig. 6 of arXiv 2603.17812, at sizes that no card holds).

Each case is one record and is kept, so an interrupted run goes on. All numbers here are predictions; where a GPU has
measured the same case, the measurement is in results/memory/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track

from bench.cases import label
from chopgrad.planner import plan
from suite.records import ROOT, Record, provenance, read_record, write_record
from suite.tables import markdown_table

GIB = 2**30
CASES = {
    "wan2.1-480x832": ("wan2.1", 97, 480, 832),
    "wan2.1-720x1280": ("wan2.1", 97, 720, 1280),
    "wan2.1-1080x1920": ("wan2.1", 97, 1080, 1920),
    "wan2.2-704x1280": ("wan2.2", 97, 704, 1280),
    "cogvideox-480x720": ("cogvideox", 49, 480, 720),
}
TARGETS_GIB = {"wan2.1-480x832": 7, "wan2.1-720x1280": 16, "wan2.1-1080x1920": 32, "cogvideox-480x720": 16}
"""Device memory that an exact gradient should need at most, in GiB."""


@dataclass
class Config:
    """Settings of the predictions."""

    cases: tuple[str, ...] = tuple(CASES)
    out: Path = ROOT / "results" / "predicted_memory"
    """Folder of the records and of the table (README.md)."""


def predict(name: str, path: Path) -> Record:
    """One case, predicted now or read back from an earlier run of the same code."""
    vae, frames, height, width = CASES[name]
    settings = {"vae": vae, "frames": frames, "height": height, "width": width, "loss": "mse", "dtype": "bfloat16"}
    made_by = provenance()
    try:
        old = read_record(path)
        if old.settings == settings and old.provenance["commit"] == made_by["commit"] and not made_by["dirty"]:
            return old
    except (ValueError, KeyError):
        pass
    rows = [
        {
            "strategy": label(p.strategy),
            "device_bytes": p.device_bytes,
            "host_bytes": p.host_bytes,
            "relative_compute": p.relative_compute,
            "distance": p.distance,
        }
        for p in plan(vae, frames, height, width, dtype=torch.bfloat16)
    ]
    write_record(path, settings, {"predictions": rows}, made_by)
    return read_record(path)


def report(records: dict[str, Record]) -> str:
    """Markdown: one table per case, and whether the target was reached."""
    lines = [
        "# Predicted peak memory",
        "",
        "Predicted on fake tensors, not measured: GiB on the device (weights included)",
    ]
    lines += [
        "and on the host, and passes relative to full back-propagation. Left out: cuDNN workspaces, fragmentation.",
        "",
    ]
    for name, record in records.items():
        s = record.settings
        lines += [f"## {s['vae']}, {s['frames']} frames of {s['height']}x{s['width']}, MSE, {s['dtype']}", ""]
        rows = [
            [
                r["strategy"],
                f"{r['device_bytes'] / GIB:.1f}",
                f"{r['host_bytes'] / GIB:.1f}",
                f"{r['relative_compute']:.2f}",
            ]
            + ["exact" if r["distance"] is None else f"truncated at {r['distance']}"]
            for r in record.metrics["predictions"]
        ]
        lines += [markdown_table(["strategy", "device GiB", "host GiB", "compute", "gradient"], rows), ""]
        if name in TARGETS_GIB:
            least = min(r["device_bytes"] for r in record.metrics["predictions"] if r["distance"] is None) / GIB
            reached = "reached" if least <= TARGETS_GIB[name] else "NOT reached"
            lines += [f"Target of {TARGETS_GIB[name]} GiB for an exact gradient: {reached} ({least:.1f} GiB).", ""]
    return "\n".join(lines)


def main(config: Config) -> None:
    unknown = [name for name in config.cases if name not in CASES]
    if unknown:
        raise ValueError(f"Unknown case '{unknown[0]}': pass some of {', '.join(CASES)}.")
    bar = track(config.cases, description="predicted memory", console=Console(stderr=True))
    text = report({name: predict(name, config.out / f"{name}.json") for name in bar})
    (config.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
