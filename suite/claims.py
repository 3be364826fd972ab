"""Claims of the paper and what was measured about them: the rows of ``results/theory.md``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["holds", "holds with correction", "fails", "undecided"]


@dataclass(frozen=True)
class Claim:
    """One statement put to the test. A record keeps it as ``metrics["claims"] = [asdict(claim), ...]``.

    Args:
        statement: what is claimed, in one sentence.
        source: where the paper says so (``Sec. 3.2``, ``Fig. 4``), or ``ours``.
        verdict: computed from the measurement, never typed in.
        evidence: the numbers behind the verdict with their intervals, formatted from the same record's metrics.
    """

    statement: str
    source: str
    verdict: Verdict
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict must be one of {', '.join(get_args(Verdict))}, got '{self.verdict}'.")


CANNOT_FAIL = ("The truncation error is at most the sum", "The truncation error is at most the full sum")
"""How statements begin that follow from the triangle inequality and the operator norm alone: where one failed, the code
would be wrong, and not the paper. They are checks, and no findings."""


def is_check(claim: Claim) -> bool:
    """Whether it could not have come out otherwise."""
    return claim.statement.startswith(CANNOT_FAIL)
