"""What the report says about one target."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """A row of the table of targets."""

    target: str
    verdict: str
    """``reached``, ``NOT reached``, ``undecided`` (intervals meet) or ``not measured here``."""
    numbers: str
    kind: str
    """Where the numbers come from: ``measured``, ``predicted``, or ``stand-in``: measured, of something near."""


def judge(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def missing(target: str, why: str = "") -> Verdict:
    return Verdict(target, "not measured here", why, "")
