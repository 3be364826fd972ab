"""The theory on one page: ``python analysis/theory_page.py`` writes ``results/theory.md``.

First the paper's claims in a dozen rows, then every claim of the records in ``results/theory/`` (see ``suite.claims``)
by the question that it answers. No verdict and no number is typed by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from analysis.theory.elsewhere import from_elsewhere
from analysis.theory.questions import QUESTIONS, REST, Question, anchor, question_of, question_of_figure
from analysis.theory.summary import HEADER as OF_SUMMARY
from analysis.theory.summary import Trial, summary
from suite.claims import Claim, Verdict, is_check
from suite.command_line import run_main
from suite.records import ROOT, Record, read_records

HEADER = ("#", "statement", "case", "in the paper", "verdict", "numbers", "experiment")
PLURAL: dict[Verdict, str] = {
    "holds": "hold", "holds with correction": "hold with correction", "fails": "fail", "undecided": "are undecided"
}  # fmt: skip
INTRODUCTION = """\
What became of the claims of [arXiv 2603.17812](https://arxiv.org/abs/2603.17812), on two small decoders that were
trained for this project, on toys and on a small backbone. `analysis/theory_page.py` writes it from the records only."""
READING = """\
An empty cell: the claim is not about that, or was not tried there. A count: verdicts differ from case to case (in
Sec. 4 a case is one score of one task). Numbers go from the least to the largest of the cases. Where a claim *holds
with correction*, its statement names it.
Below, each statement has a row for every decoder, toy or case that it was tried on. Numbers there are means with 95 %
bootstrap intervals (clips as clusters) unless they say otherwise; an empty *in the paper* marks a statement of ours."""
SYMBOLS = """\
- I(i, j): influence of latent group j on frame group i, a norm of the Jacobian of one by the other. It is the operator
  norm where errors are bounded (`error_bound.py`) and the Frobenius norm where decay is followed
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
    found = list(claims_of(records))
    if not found:
        raise ValueError(f"No record in '{folder.name}' makes a claim: run 'python -m analysis --full' first.")
    lines = ["# The theory, put to the test", "", INTRODUCTION, "", _row(OF_SUMMARY), _row(["---"] * len(OF_SUMMARY))]
    lines += [_row(row) for row in summary([*_trials(found), *from_elsewhere(folder.parent)])]
    findings = [claim for claim, _ in found if not is_check(claim)]
    counts = Counter(claim.verdict for claim in findings)
    listed = ", ".join(f"{counts[v]} {PLURAL[v]}" for v in get_args(Verdict) if counts[v])
    counted = f"Of {len(findings)} rows {listed}."
    if checks := len(found) - len(findings):
        counted += f" Another {checks} *check the code*: inequalities that cannot fail, and are no findings."
    lines += ["", READING, counted, "", "## Symbols", "", SYMBOLS]
    pictures, number = sorted(folder.glob("*.png")), 0
    for question in (*QUESTIONS, REST):
        mine = [(claim, record) for claim, record in found if question_of(claim.statement) == question]
        shown = [p for p in pictures if question_of_figure(p.stem) == question]
        if mine or shown:
            lines += _section(question, mine, shown, folder, number)
            number += len(mine)
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


def _trials(found: Sequence[tuple[Claim, Record]]) -> Iterator[Trial]:
    for claim, record in found:
        vae, heading = record.settings.get("vae", ""), question_of(claim.statement).heading
        yield Trial(claim, vae if isinstance(vae, str) else "", f"[{heading}](#{anchor(heading)})")


def _section(
    question: Question, found: Sequence[tuple[Claim, Record]], pictures: Sequence[Path], folder: Path, before: int
) -> list[str]:
    """One question: figures, then a row a claim, numbered from ``before`` on."""
    lines = [f"## {question.heading}", ""]
    for picture in pictures:
        lines += [f"![{picture.stem.replace('_', ' ')}]({folder.name}/{picture.name})", ""]
    if not found:
        return lines
    lines += [_row(HEADER), _row(["---"] * len(HEADER))]
    # Statements in the question's order; claims of one statement stay in theirs (the sort is stable).
    for k, (claim, record) in enumerate(sorted(found, key=lambda pair: question.place(pair[0].statement) or 0), 1):
        source = "" if claim.source == "ours" else claim.source
        verdict = f"**{claim.verdict}**" + (" (a check of the code)" if is_check(claim) else "")
        cells = [before + k, claim.statement, _case(record), source, verdict, claim.evidence]
        lines.append(_row([*cells, _experiment(record, folder)]))
    return [*lines, ""]


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
