"""Markdown tables, aligned so that they read well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column is aligned left, the others right; floats are shown with three significant digits."""
    cells = [list(map(str, header)), *([_text(x) for x in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def with_interval(triple: Sequence[float], digits: int = 3) -> str:
    """``mean [low, high]``."""
    mean, low, high = (f"{x:.{digits}f}" for x in triple)
    return f"{mean} [{low}, {high}]"


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
