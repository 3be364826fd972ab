"""One run on one card: its clock, its log and its records."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from bench.gpu.clock import Clock
from suite.records import provenance, read_record, write_record


class Session:
    """One card, its clock, and where results go.

    Args:
        out: the card's folder is made in it.
        seconds: budget.
        device: cuda, or cpu for a rehearsal.
    """

    def __init__(self, out: Path, seconds: float, device: str) -> None:
        self.device = device
        self.dtype = "bfloat16" if device == "cuda" else "float32"
        self.clock = Clock(seconds)
        self.made_by = provenance(self.device)
        name = self.made_by["device"] if device == "cuda" else device
        self.folder = out / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.started:6.1f} s  {text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def write(self, name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
        write_record(self.folder / f"{name}.json", settings, metrics, self.made_by)

    def has(self, name: str) -> bool:
        """Whether an earlier run of the same code on the same card wrote it."""
        try:
            old = read_record(self.folder / f"{name}.json").provenance
        except ValueError:
            return False
        same = all(old.get(k) == self.made_by[k] for k in ("commit", "torch", "diffusers", "device"))
        return same and self.made_by["commit"] is not None and self.made_by["dirty"] is False is old.get("dirty")
