"""The records of ``analysis/predicted_memory.py``: what was predicted for the published architectures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.records import ROOT, read_records

GIB = 2**30
FOLDER = ROOT / "results" / "predicted_memory"
CASES = {
    "wan2.1-480x832": ("wan2.1", 97, 480, 832),
    "wan2.1-720x1280": ("wan2.1", 97, 720, 1280),
    "wan2.1-1080x1920": ("wan2.1", 97, 1080, 1920),
    "wan2.2-704x1280": ("wan2.2", 97, 704, 1280),
    "cogvideox-480x720": ("cogvideox", 49, 480, 720),
}
"""The tables: what the planner considers by default."""
CURVE_FRAMES = (9, 25, 49, 97, 193)
CURVES = {f"wan2.1-{h}x{w}-{n}f": ("wan2.1", n, h, w) for h, w in ((480, 832), (720, 1280)) for n in CURVE_FRAMES}
"""Memory against frames: what ``tox -e bench -- --full`` measures first."""
TARGETS_GIB = {"wan2.1-480x832": 2, "wan2.1-720x1280": 4, "wan2.1-1080x1920": 8, "cogvideox-480x720": 5}
"""Device memory that an exact gradient should need at most, in GiB."""

Row = dict[str, Any]
"""One strategy's prediction: strategy (its label), device_bytes, host_bytes, relative_compute, distance."""


def predictions(folder: Path = FOLDER) -> dict[tuple[str, int, int], dict[int, dict[str, Row]]]:
    """{(vae, height, width): {frames: {label of the strategy: row}}} of all records in a folder."""
    found: dict[tuple[str, int, int], dict[int, dict[str, Row]]] = {}
    for record in read_records(folder):
        s = record.settings
        at = found.setdefault((s["vae"], s["height"], s["width"]), {}).setdefault(s["frames"], {})
        at |= {row["strategy"]: row for row in record.metrics["predictions"]}
    return found


def least_exact(rows: Mapping[str, Row]) -> Row:
    """The exact gradient that needs the least device memory; of those within a percent of it, the one that computes
    least.
    """
    exact = [r for r in rows.values() if r["distance"] is None]
    least = min(r["device_bytes"] for r in exact)
    return min((r for r in exact if r["device_bytes"] <= 1.01 * least), key=lambda r: r["relative_compute"])
