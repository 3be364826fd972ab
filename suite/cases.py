"""Cases of a longer run: one record each; what an earlier run of the same code and inputs finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from suite.records import Record, provenance, read_record, write_record


def run_case(
    path: Path,
    settings: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    device: str = "cpu",
    code_in_settings: bool = False,
) -> Record:
    """The record of one case: read back if it is finished, else measured and written.

    A record is kept only if its settings (put a fingerprint of weights and clips there), commit, torch and device are
    those of this process, and the code has not been changed since that commit.

    Args:
        path: the record, ``<area>/<case>.json``.
        settings: every parameter, as JSON values.
        measure: computes the metrics.
        code_in_settings: a fingerprint of the code that decides the result is among the settings too, so that a record
            outlives commits that do not touch it.
    """
    made_by = provenance(device)
    keys = ("torch", "device") if code_in_settings else ("commit", "dirty", "torch", "device")
    try:
        old = read_record(path)
        same = all(old.provenance.get(key) == made_by[key] for key in keys)
        if same and old.settings == dict(settings) and (code_in_settings or not made_by["dirty"]):
            return old
    except ValueError:  # none yet
        pass
    return read_record(write_record(path, settings, measure(), made_by))
