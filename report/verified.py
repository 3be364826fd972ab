"""What running records again has shown: ``results/verified.jsonl``, a line for each record that was made again.

Settings and metrics are compared leaf by leaf. Left out are measured times, what the operating system counts of memory,
and numbers within sentences, which are rounded copies of others. The difference of two numbers is relative: to the
larger of them, but at least to a hundredth of the largest number of that name in the record, and to ``LEAST``, so that
of numbers that are nothing but rounding no digits are compared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from report.freshness import CURRENT, History
from suite.records import Record

FILE = "verified.jsonl"
LEAST = 1e-3
MEASURED_ANEW = re.compile(r"^(.*_)?seconds(_median)?$|^time_ratio$|_times_time$|^ratio_to_reference$|^resident_growth")
FROM_FORMULAS = ("relative_seconds",)
"""A name of a time, of one that is computed."""
NOT_SETTINGS = ("code", "checkpoint")
"""A fingerprint of the code that made the record, and what a training's decoder recomputes: of memory alone."""
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Outcome:
    """One record made again.

    Attributes:
        product: patterns of the records that it is one of.
        record: its file, relative to ``results/``.
        made: date of that record, which tells it from a later one of the same name.
        commit, date, device, torch: of the code and machine that made it again.
        compared: number of leaves.
        differences: name of a leaf -> its largest difference; None where something other than a number differs, or is
            missing. Empty if all are identical.
        tolerance: what was allowed.
    """

    product: str
    record: str
    made: str
    commit: str
    date: str
    device: str
    torch: str
    compared: int
    differences: dict[str, float | None]
    tolerance: float

    @property
    def largest(self) -> float:
        """Largest difference; infinite where it has no number."""
        return max((_size(difference) for difference in self.differences.values()), default=0.0)

    @property
    def holds(self) -> bool:
        return self.largest <= self.tolerance

    @property
    def words(self) -> str:
        """``identical``, or what differs most."""
        if not self.differences:
            return "identical"
        name = max(self.differences, key=lambda name: _size(self.differences[name]))
        if self.differences[name] is None:
            return f"`{name}` is not the same"
        return f"largest difference {self.largest:.1g} (`{name}`)"


def compare(old: Record, new: Record) -> tuple[int, dict[str, float | None]]:
    """(number of leaves compared, differences by name of the leaf) of what the old record says.

    What the new one says besides is no difference: nothing was drawn from it.
    """
    before = {path: leaf for path, leaf in _leaves(_content(old)) if not _is_left_out(path)}
    after = dict(_leaves(_content(new)))
    scale: dict[str, float] = {}
    for path, leaf in before.items():
        if _is_number(leaf):
            scale[_name(path)] = max(scale.get(_name(path), 0.0), abs(leaf))
    found: dict[str, float | None] = {}
    for path, leaf in before.items():
        name, other = _name(path), after.get(path)
        if _is_number(leaf) and _is_number(other):
            least = max(0.01 * scale[name], LEAST)
            difference = abs(leaf - other) / max(abs(leaf), abs(other), least)
            if difference > _size(found.get(name, 0.0)):
                found[name] = difference
        elif path not in after or _without_numbers(leaf) != _without_numbers(other):
            found[name] = None
    return len(before), found


def read_outcomes(results: Path) -> list[Outcome]:
    """Those of the log, the oldest first."""
    path = results / FILE
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def append(results: Path, outcome: Outcome) -> None:
    with (results / FILE).open("a") as file:
        file.write(json.dumps(asdict(outcome), allow_nan=False) + "\n")


def latest(outcomes: Iterable[Outcome], records: Iterable[Record], results: Path) -> list[tuple[Record, Outcome]]:
    """Each record that was made again, and its last outcome; those of an earlier record of its name do not count."""
    found = {(o.record, o.made): o for o in outcomes}
    keys = {(r.path.relative_to(results).as_posix(), r.provenance["date"]): r for r in records}
    return [(record, found[key]) for key, record in keys.items() if key in found]


def of_this_code(record: Record, outcome: Outcome, history: History) -> bool:
    """Whether the code that made it again is what is there now."""
    provenance = record.provenance | {"commit": outcome.commit, "dirty": False}
    return history.freshness(replace(record, provenance=provenance)).word == CURRENT


def sentence(made_again: Sequence[tuple[Record, Outcome]], total: int, history: History) -> str:
    """``2 of 32 run again at 1234567890: identical``, or with the largest difference; empty where none was."""
    if not made_again:
        return ""
    outcomes = sorted((o for _, o in made_again), key=lambda o: o.date)
    commits = ", ".join(dict.fromkeys(o.commit[:10] for o in outcomes))
    later = "" if all(of_this_code(*pair, history) for pair in made_again) else ", before other changes"
    worst = max(outcomes, key=lambda o: o.largest)
    words = worst.words if worst.holds else f"**{worst.words}**"
    return f"{len(outcomes)} of {total} run again at {commits}{later}: {words}"


def _size(difference: float | None) -> float:
    return math.inf if difference is None else difference


def _content(record: Record) -> dict[str, Any]:
    settings = {k: v for k, v in record.settings.items() if k not in NOT_SETTINGS}
    return {"settings": settings, "metrics": record.metrics}


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """An empty list or object is a leaf."""
    if isinstance(value, Mapping | list) and value:
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(part, (*path, str(key)))
    else:
        yield path, value


def _name(path: Sequence[str]) -> str:
    """What a leaf is called: the last part that is no number."""
    return next((part for part in reversed(path) if not part.isdigit()), "")


def _is_left_out(path: Sequence[str]) -> bool:
    return path[0] == "metrics" and any(MEASURED_ANEW.search(p) and p not in FROM_FORMULAS for p in path)


def _is_number(leaf: Any) -> TypeGuard[float]:
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def _without_numbers(leaf: Any) -> Any:
    return NUMBER.sub("#", leaf) if isinstance(leaf, str) and " " in leaf else leaf
