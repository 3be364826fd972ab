"""The theory's claims in one table: ``python analysis/theory_page.py`` writes ``results/theory.md``.

Every row comes from the ``claims`` of a record in ``results/theory/`` (see ``suite.claims``); nothing is typed by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from suite.claims import Claim, Verdict
from suite.command_line import run_main
from suite.records import ROOT, Record, read_records

HEADER = ("#", "statement", "case", "in the paper", "verdict", "numbers", "experiment")
PLURAL: dict[Verdict, str] = {
    "holds": "hold", "holds with correction": "hold with correction", "fails": "fail", "undecided": "are undecided"
}  # fmt: skip
SYMBOLS = """\
- I(i, j): influence of latent group j on frame group i, a norm of the Jacobian of one by the other: the operator norm
  where errors are bounded (`error_bound.py`), the Frobenius norm where its decay is followed
  (`temporal_locality.py`), so their alphas differ. D = i - j: distance in frame groups, and the distance of a
  truncation. W: groups in a block.
- C, alpha: of the bound I(i, j) <= C exp(-alpha D). G: largest norm of a group's loss gradient. eps: tolerance.
- *Whole video*: the rule asks for a distance at which nothing is cut. *Held-out pair*: of a clip (or crop) that C and
  alpha were not fitted on.
- Normalised MAE: mean |g_D - g| over mean |g|, over all entries. m: squared relative bias |g_D - g|^2 / |g|^2. zeta,
  mu: absolute bias, and constant of the Polyak-Lojasiewicz condition. AICc: corrected Akaike criterion, lower is
  better.
"""


@dataclass
class Config:
    """Settings of the report."""

    folder: Path = ROOT / "results" / "theory"
    """Folder of records and figures; the report is written beside it, as <folder>.md."""


def claims_of(records: list[Record]) -> Iterator[tuple[Claim, Record]]:
    """Every claim with its record: those of the paper first, by section and figure, then ours.

    Raises:
        ValueError: a claim that is not one; the message names the record.
    """
    found = []
    for record in records:
        for fields in record.metrics.get("claims", []):
            try:
                found.append((Claim(**fields), record))
            except (TypeError, ValueError) as error:
                raise ValueError(f"'{record.path.name}' holds a claim that cannot be read: {error}") from error
    yield from sorted(found, key=_order)


def _order(pair: tuple[Claim, Record]) -> tuple[bool, bool, str, str]:
    source = pair[0].source
    return source == "ours", not source.startswith("Sec."), source, pair[1].path.stem


def report(folder: Path) -> str:
    """The report as Markdown.

    Raises:
        ValueError: no record in the folder makes a claim.
    """
    records = list(read_records(folder))
    rows = list(claims_of(records))
    if not rows:
        raise ValueError(f"No record in '{folder.name}' makes a claim: run 'python -m analysis --full' first.")
    counts = Counter(claim.verdict for claim, _ in rows)
    lines = [
        "# The theory, put to the test",
        "",
        "Statements of Sec. 3.2 and 3.3 of [arXiv 2603.17812](https://arxiv.org/abs/2603.17812), and our own, as",
        "experiments that could fail. Numbers are means with 95 % bootstrap intervals (clips as clusters) unless they",
        "say otherwise. Where a verdict is *holds with correction*, the statement names the correction. This page is",
        f"written by `analysis/theory_page.py` from the records in `{folder.name}/`.",
        "",
        f"Of {len(rows)} rows "
        + ", ".join(f"{counts[v]} {PLURAL[v]}" for v in get_args(Verdict) if counts[v])
        + "; a statement has a row for each decoder, toy or case that it was tried on.",
        "",
        SYMBOLS,
        _row(HEADER),
        _row(["---"] * len(HEADER)),
    ]
    for k, (claim, record) in enumerate(rows, 1):
        source = "" if claim.source == "ours" else claim.source
        cells = [k, claim.statement, _case(record), source, f"**{claim.verdict}**", claim.evidence]
        lines.append(_row([*cells, _experiment(record, folder)]))
    lines += ["", "An empty cell under *in the paper* marks a statement of ours.", ""]
    for picture in sorted(folder.glob("*.png")):
        lines += [f"![{picture.stem.replace('_', ' ')}]({folder.name}/{picture.name})", ""]
    lines += ["## How each record was made", "", _row(["record", "command", "commit", "date"]), _row(["---"] * 4)]
    for record in records:
        made = record.provenance
        commit = (made["commit"] or "unknown")[:10] + (" with uncommitted changes" if made.get("dirty") else "")
        name = f"[{record.path.stem}]({folder.name}/{record.path.name})"
        lines.append(_row([name, f"`{made['command']}`", commit, made["date"][:10]]))
    return "\n".join(lines) + "\n"


def write_report(folder: Path) -> Path:
    """Write the report beside the folder of records."""
    path = folder.with_suffix(".md")
    path.write_text(report(folder))
    return path


def _case(record: Record) -> str:
    """What the names of the records of one experiment differ in."""
    return record.path.stem.partition("-")[2]


def _experiment(record: Record, folder: Path) -> str:
    script = re.search(r"analysis/\w+\.py", record.provenance["command"])
    return f"{script.group() if script else record.path.stem}, [record]({folder.name}/{record.path.name})"


def _row(cells: object) -> str:
    # Cells are sentences: a table padded to the longest of them could not be read as text either.
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"  # type: ignore[attr-defined]


def main(config: Config) -> None:
    print(f"Written: {write_report(config.folder).name}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
