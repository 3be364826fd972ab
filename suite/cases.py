"""Cases of a longer run: one record each; what an earlier run of the same code and inputs finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from suite.records import Record, provenance, read_record, write_record


def run_case(
    path: Path, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], device: str = "cpu"
) -> Record:
    """The record of one case: read back if it is finished, else measured and written.

    A record is kept only if its settings (put a fingerprint of weights and clips there), commit, torch and device are
    those of this process, and the code has not been changed since that commit.

    Args:
        path: the record, ``<area>/<case>.json``.
        settings: every parameter, as JSON values.
        measure: computes the metrics.
    """
    made_by = provenance(device)
    try:
        old = read_record(path)
        same = all(old.provenance.get(key) == made_by[key] for key in ("commit", "dirty", "torch", "device"))
        if same and old.settings == dict(settings) and not made_by["dirty"]:
            return old
    except ValueError:  # none yet
        pass
    return read_record(write_record(path, settings, measure(), made_by))
