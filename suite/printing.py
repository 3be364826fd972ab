"""What a script prints of the claims in its records."""

from __future__ import annotations

from collections.abc import Iterable

from suite.records import Record


def print_claims(records: Iterable[Record], bullets: bool = False) -> None:
    """Two lines a claim; with ``bullets`` one item of a Markdown list, as under a table."""
    for record in records:
        for claim in record.metrics["claims"]:
            verdict, statement, evidence = (claim[k] for k in ("verdict", "statement", "evidence"))
            print(f"- {verdict}: {statement} ({evidence})" if bullets else f"{verdict}: {statement}\n  {evidence}")
