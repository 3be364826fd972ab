"""Records that stay true: ``python -m report.verify 2`` makes two records a product again with today's code.

They are drawn at random among those whose code has changed since (``report.freshness``), made again by their own
commands in a temporary folder (``report.rerun``), and compared leaf by leaf (``report.verified``): on the same
processor with the same torch they must be identical. Each outcome is a line of ``results/verified.jsonl``, and the
index tells it beside the mark; the other records keep theirs. What was made again at this state of the code is not made
again: after an interruption, or with a larger number, it goes on. Ends with status 1 where something differs by more.

Cost: what the records cost, seconds to an hour each; of errors and predictions, what all cases of the video cost.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from report.freshness import CHANGED, History
from report.rerun import obstacle, rerun, together
from report.results_index import Row, rows
from report.verified import Outcome, append, compare, latest, of_this_code, read_outcomes
from suite.command_line import run_main
from suite.progress import Bar
from suite.records import ROOT, Record, provenance


@dataclass
class Config:
    """Settings of the check."""

    count: Annotated[int, tyro.conf.Positional] = 1
    """Records of each product."""
    products: tuple[str, ...] = ()
    """Words such as theory/toys or "Table 1": only products with one of them in their name or in that of their
    records."""
    minutes: float | None = None
    """In all. Each run gets its share of what is left, and is told of if it takes longer."""
    seed: int = 0
    """Of the draw."""
    tolerance: float = 1e-3
    """Largest relative difference where processor or torch is another one; where both are the same: none."""
    clips: Path | None = None
    """Folder with the videos that records were made of, by their names."""
    results: Path = ROOT / "results"
    """Folder of the records and of the log."""


@dataclass(frozen=True)
class Drawn:
    """Records of a product that one run makes again."""

    product: str
    records: Sequence[Record]


def chosen(config: Config, history: History) -> list[Row]:
    """Rows of the index with what may be drawn: records whose code has changed since.

    Raises:
        ValueError: no product has that name.
    """
    named = {f"{row.product.paper} {_patterns(row)}": row for row in rows(config.results, history) if row.records}
    if unknown := [word for word in config.products if not any(word in name for name in named)]:
        raise ValueError(f"--products: nothing with records is called {', '.join(unknown)}; see results/README.md.")
    found = []
    for name, row in named.items():
        if not config.products or any(word in name for word in config.products):
            pairs = [(r, m) for r, m in zip(row.records, row.marks, strict=True) if m.word == CHANGED]
            found.append(Row(row.product, [r for r, _ in pairs], [m for _, m in pairs]))
    return found


def draw(
    config: Config, listed: Sequence[Row], done: Sequence[Outcome], history: History
) -> tuple[list[Drawn], list[Outcome]]:
    """(what to make again, what was already made again with this code); says why others cannot be."""
    todo, known = [], []
    for row in listed:
        why = {r.path: obstacle(r, config.clips) for r in row.records}
        for reason, count in Counter(reason for reason in why.values() if reason).items():
            print(f"{_patterns(row)}: not here: each of {count} {reason}.")
        possible = [r for r in row.records if why[r.path] is None]
        order = random.Random(f"{config.seed} {_patterns(row)}")  # one product's draw does not depend on the others
        sample = order.sample(possible, len(possible))[: config.count]
        before = [o for r, o in latest(done, sample, config.results) if of_this_code(r, o, history)]
        for outcome in before:
            print(f"{outcome.record}: {outcome.words}, as made again at {outcome.commit[:10]}.")
        known += before
        runs: dict[tuple[str, ...], list[Record]] = {}
        for record in sample:
            if _place(record, config) not in {outcome.record for outcome in before}:
                runs.setdefault(together(record), []).append(record)
        todo += [Drawn(_patterns(row), records) for records in runs.values()]
    return todo, known


def again(drawn: Drawn, config: Config, seconds: float | None) -> list[Outcome]:
    """The records made again and compared; raises what ``rerun`` raises."""
    with tempfile.TemporaryDirectory() as folder:
        found = rerun(drawn.records, config.results, Path(folder), config.clips, seconds)
    return [_outcome(drawn.product, old, new, config) for old, new in zip(drawn.records, found, strict=True)]


def _outcome(product: str, old: Record, new: Record, config: Config) -> Outcome:
    made = new.provenance
    same = all(old.provenance[key] == made[key] for key in ("device", "torch"))
    compared, differences = compare(old, new)
    return Outcome(
        product, _place(old, config), old.provenance["date"], made["commit"], made["date"], made["device"],
        made["torch"], compared, differences, 0.0 if same else config.tolerance,
    )  # fmt: skip


def _patterns(row: Row) -> str:
    return ", ".join(row.product.records)


def _place(record: Record, config: Config) -> str:
    return record.path.relative_to(config.results).as_posix()


def main(config: Config) -> None:
    if config.count < 1 or config.tolerance < 0 or (config.minutes is not None and not config.minutes > 0):
        raise ValueError(
            "The number of records must be at least 1, --minutes positive and --tolerance not negative, got "
            f"{config.count}, {config.minutes} and {config.tolerance}."
        )
    if provenance()["dirty"] is not False:
        raise ValueError("The log names the commit whose code ran: commit your changes first, in a clone with git.")
    history = History()
    todo, known = draw(config, chosen(config, history), read_outcomes(config.results), history)
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    bad = [outcome.record for outcome in known if not outcome.holds]
    count, left = sum(len(drawn.records) for drawn in todo), len(todo)
    with Bar("made again", count) as bar:
        for drawn in todo:
            places = [_place(record, config) for record in drawn.records]
            bar.say(", ".join(places))
            share = None if deadline is None else max(1.0, deadline - time.monotonic()) / left
            left -= 1
            begun = time.monotonic()
            try:
                outcomes = again(drawn, config, share)
            except TimeoutError as error:
                print(f"{', '.join(places)}: {error}, the share of --minutes.", flush=True)
            except RuntimeError as error:
                bad += places
                print(f"{', '.join(places)}: cannot be made any more: {error}.", flush=True)
            else:
                seconds = time.monotonic() - begun
                for outcome in outcomes:
                    append(config.results, outcome)
                    words = ("" if outcome.holds else "DIFFERENT: ") + outcome.words
                    print(f"{outcome.record}: {words} ({outcome.compared} leaves, {seconds:.0f} s).", flush=True)
                bad += [o.record for o in outcomes if not o.holds]
            bar.advance(len(places))
    print("Run python -m report.results_index, which tells it beside the marks.")
    if bad:
        raise RuntimeError(f"{len(bad)} of {count + len(known)} are not what they were: {', '.join(bad)}")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {RuntimeError: ""})
