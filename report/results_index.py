"""``results/README.md``, made from the records: ``python -m report.results_index``.

Each line leads from a figure or table to its files, the command, device, date and commit that made them, and says
whether that code has changed since (``report.freshness``). ``--check`` compares the page, ``--why`` lists what changed.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from report.freshness import CHANGED, CURRENT, UNCOMMITTED, UNKNOWN, Freshness, History
from report.products import PRODUCTS, Product
from report.verified import latest, read_outcomes, sentence
from suite.command_line import run_main
from suite.records import ROOT, Record, read_record

INTRODUCTION = """\
# Results

One JSON record per case: `settings`, `metrics` (units in the names, intervals beside means) and `provenance` (command,
commit, versions, device). Tables and figures are drawn from the records only. This page is written by
`python -m report.results_index`; do not edit it by hand.
"""
FRESHNESS = """\
*Code* says whether the code that a record's command runs has changed since the record's commit: the script, every
module of the project that it imports, and the weights that it used. Comments, docstrings and layout do not count, nor
does the place of a file: what only moved is what it was.

- **current**: nothing changed.
- **changed since**: something did. It does not say that the numbers are wrong; it says that nobody has shown that they
  still are right. `python -m report.results_index --why` lists the files. Where `python -m report.verify` made some
  again, drawn at random, it says how many and the largest relative difference ([log](verified.jsonl)); of the others
  that shows nothing.
- **made by uncommitted code**: the record's commit does not tell what ran.
- **unknown**: the commit is not known here (none was recorded, or this copy has no git history with it), or the script
  of the command is gone. Scripts keep their names, so that commands stay good.
"""


@dataclass
class Config:
    """Settings of the index."""

    check: bool = False
    """Write nothing; end with status 1 where the page is not what the records say."""
    why: bool = False
    """Write nothing; list the files that changed since the records were made."""
    results: Path = ROOT / "results"
    """Folder of the records; its README.md is written."""


@dataclass
class Row:
    """A product with what was found for it."""

    product: Product
    records: list[Record]
    marks: list[Freshness] = field(default_factory=list)
    again: str = ""
    """What running some of the changed ones again has shown (``report.verify``); empty where nobody has."""

    def code(self) -> str:
        """The marks, with their counts where they differ, and what is known besides."""
        counts = Counter(mark.word for mark in self.marks)
        marks = ", ".join(
            f"{counts[w]} {_emphasised(w)}" if len(counts) > 1 else _emphasised(w)
            for w in (CURRENT, CHANGED, UNCOMMITTED, UNKNOWN)
            if counts[w]
        )
        return f"{marks}; {self.again}" if self.again else marks


def rows(results: Path, history: History) -> list[Row]:
    """A row a product, in order; at the end one for each folder with records that no product names."""
    found = {path: _record(path) for path in sorted(results.rglob("*.json"))}
    records = {path: record for path, record in found.items() if record is not None}
    claimed: set[Path] = set()
    listed = []
    for product in PRODUCTS:
        meant = {path for pattern in product.records for path in results.glob(pattern)}
        paths = [p for p in records if p in meant]
        claimed.update(paths)
        listed.append(Row(product, [records[p] for p in paths]))
    others: dict[str, list[Record]] = {}
    for path in (p for p in records if p not in claimed):
        others.setdefault(path.parent.relative_to(results).as_posix(), []).append(records[path])
    for folder, rest in others.items():
        listed.append(Row(Product("", "", (), (f"{folder}/*.json",), ""), rest))
    outcomes = read_outcomes(results)
    for row in listed:
        row.marks = [history.freshness(record) for record in row.records]
        changed = [r for r, mark in zip(row.records, row.marks, strict=True) if mark.word == CHANGED]
        row.again = sentence(latest(outcomes, changed, results), len(row.records), history)
    return listed


def page(results: Path, found: Sequence[Row]) -> str:
    """The whole page as Markdown."""
    there, missing = [r for r in found if r.records], [r for r in found if not r.records]
    lines = [INTRODUCTION, "## What lies where", "", _line("in the paper", "question", "to look at", "command")]
    lines.append(_line(*["---"] * 4))
    for row in there:
        p = row.product
        if p.question:
            lines.append(_line(p.paper, p.question, _links(results, p.shown), p.command))
    lines += ["", "## How it was made", ""]
    lines.append(_line("in the paper", "records", "count", "command as run", "device", "date", "commit", "code"))
    lines.append(_line("---", "---", "---:", *["---"] * 5))
    for row in there:
        made = [r.provenance for r in row.records]
        lines.append(
            _line(
                row.product.paper,
                ", ".join(_pattern(results, p) for p in row.product.records),
                len(made),
                "; ".join(f"`{c}`" for c in _distinct(m["command"].strip() for m in made)),
                "; ".join(_distinct(f"{m['device']} ({m['threads']} threads)" for m in made)),
                _range([m["date"][:10] for m in made]),
                ", ".join(_distinct((m["commit"] or "unknown")[:10] for m in _by_date(made))),
                row.code(),
            )
        )
    lines += ["", FRESHNESS.rstrip()]
    if missing:
        lines += ["", "## Not measured yet", ""]
        lines += [f"- {r.product.paper}: {r.product.question} ({r.product.command})" for r in missing]
    return "\n".join(lines) + "\n"


def differences(results: Path, history: History, marks: bool = True) -> list[str]:
    """Where the page on disk is not what the records say, as a diff; marks count where they can be known here.

    Args:
        marks: whether the marks count; the next change of code outdates them, and a history that was rewritten, too.
    """
    found = rows(results, history)
    on_disk = (results / "README.md").read_text() if (results / "README.md").is_file() else ""
    expected = page(results, found)
    if not (marks and history.known):  # an unpacked archive: whoever wrote the page knew more
        on_disk, expected = _without_marks(on_disk), _without_marks(expected)
    before, after = on_disk.splitlines(), expected.splitlines()
    return list(difflib.unified_diff(before, after, "README.md", "records", lineterm="", n=0))


def reasons(found: Iterable[Row]) -> list[str]:
    """What changed, a line a row and set of files."""
    lines = []
    for row in found:
        for mark, count in Counter(m for m in row.marks if m.word != CURRENT).items():
            files = ", ".join(mark.files) or "no file"
            lines.append(f"{', '.join(row.product.records)}: {count} {mark.word}: {files}")
    return lines


def _without_marks(text: str) -> str:
    """The page with the last cell of every line with eight of them left out."""
    lines = text.splitlines()
    return "\n".join(line.rsplit(" | ", 1)[0] if line.count(" | ") == 7 else line for line in lines)


def _record(path: Path) -> Record | None:
    try:
        return read_record(path)
    except ValueError:
        return None


def _links(results: Path, shown: Iterable[str]) -> str:
    files = [p.relative_to(results).as_posix() for pattern in shown for p in sorted(results.glob(pattern))]
    return ", ".join(f"[{name}]({name})" for name in files)


def _pattern(results: Path, pattern: str) -> str:
    return f"`{pattern}`" if any(c in pattern for c in "*?") else f"[{pattern}]({pattern})"


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _by_date(made: Iterable[dict]) -> list[dict]:
    return sorted(made, key=lambda m: m["date"])


def _range(dates: Sequence[str]) -> str:
    return min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"


def _emphasised(word: str) -> str:
    return word if word == CURRENT else f"**{word}**"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def main(config: Config) -> None:
    if not config.results.is_dir():
        raise NotADirectoryError(f"--results must be a folder of records, but '{config.results.name}' is not a folder.")
    history = History()
    if config.check:
        if found := differences(config.results, history):
            told = "README.md is not what the records say: run python -m report.results_index"
            raise ValueError("\n".join([told, *found]))
        return
    listed = rows(config.results, history)
    if config.why:
        print("\n".join(reasons(listed)))
        return
    (config.results / "README.md").write_text(page(config.results, listed))
    counts = Counter(mark.word for row in listed for mark in row.marks)
    print(f"Written: README.md in {config.results.name}/; records: " + ", ".join(f"{n} {w}" for w, n in counts.items()))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
