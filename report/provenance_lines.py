"""Where numbers come from, in a line for each command: what notebooks end with."""

from __future__ import annotations

from collections.abc import Iterable

from suite.records import ROOT, Record


def made_by(records: Iterable[Record]) -> list[str]:
    """A Markdown list: number and folder of the records that one command made at one commit, on which day."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        made = record.provenance
        folder = record.path.parent
        shown = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name
        commit = (made["commit"] or "unknown")[:10] + (" with local changes" if made.get("dirty") else "")
        found.setdefault((shown, made["command"].strip(), commit, made["device"]), []).append(record)
    lines = []
    for (place, command, commit, device), group in found.items():
        days = sorted({r.provenance["date"][:10] for r in group})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(
            f"- `{place}/`, {len(group)} record{'s' * (len(group) > 1)}: `{command}`, commit {commit}, {when}, {device}"
        )
    return lines
