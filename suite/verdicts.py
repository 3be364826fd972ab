"""Verdicts that follow from intervals: what claims are judged by."""

from __future__ import annotations

from collections.abc import Sequence

from suite.claims import Verdict


def above(intervals: Sequence[Sequence[float]], threshold: float = 0.0, lenient: bool = False) -> Verdict:
    """Holds if every [mean, low, high] lies above; fails if one lies below; else undecided.

    Args:
        lenient: an interval that holds the threshold is no objection.
    """
    if any(high < threshold for _, _, high in intervals):
        return "fails"
    return "holds" if lenient or all(low > threshold for _, low, _ in intervals) else "undecided"


def below(intervals: Sequence[Sequence[float]], threshold: float) -> Verdict:
    """Holds if every [mean, low, high] lies below; fails if one lies above; else undecided."""
    return above([[-mean, -high, -low] for mean, low, high in intervals], -threshold)
