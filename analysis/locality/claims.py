"""Verdicts on temporal locality (Sec. 3.2, Fig. 3), and on how training makes it."""

from __future__ import annotations

from typing import Any

from analysis.locality.decay import MODELS
from suite.claims import Claim, Verdict
from suite.tables import with_interval

MARGIN = 10.0  # a C that changes from clip to clip by more than one order of magnitude predicts nothing


def claims(name: str, trained: dict[str, Any], young: dict[str, Any]) -> list[Claim]:
    """What the fits of a trained decoder and of the same decoder with random weights say about the statements."""
    alpha, held = trained["alpha_per_group"], trained["held_out_bound"]
    share = sum(r["share_held"] * r["pairs"] for r in held) / max(1, sum(r["pairs"] for r in held))
    ratio = max((r["largest_ratio"] for r in held), default=float("nan"))
    if alpha[1] <= 0:
        bounded: Verdict = "fails"
    elif not held:
        bounded = "undecided"
    else:
        bounded = "holds" if share == 1 else "holds with correction" if ratio <= MARGIN else "fails"
    models, winner = trained["models"], trained["winner"]
    wins = models[winner]["bootstrap_wins"]
    shape: Verdict = "undecided"
    if wins >= 0.95:
        # A finite support lies below its exponential envelope: the statement survives as a bound, not as the law.
        shape = {"exponential": "holds", "finite support": "holds with correction", "power law": "fails"}[winner]  # type: ignore[assignment]
    above = ", ".join(
        f"{m} +{models[m]['aicc_above_best']:.1f}" for m in MODELS if m != winner and models[m]["aicc_above_best"]
    )
    support = models["finite support"]["support_groups"]
    before, after = young["share_beyond"]["1"], trained["share_beyond"]["1"]
    created: Verdict = "holds" if after[2] < before[1] else "fails" if after[1] > before[2] else "undecided"
    margin = "; correction: C needs a margin of that factor" if bounded == "holds with correction" else ""
    faster = "; correction: in the end faster, as towards a finite support" if shape == "holds with correction" else ""
    return [
        Claim(
            f"Temporal locality: there are C, alpha > 0 with I(i,j) <= C exp(-alpha D(i,j)) ({name}, trained; C and "
            f"alpha from the other clips or crops{margin}).",
            "Sec. 3.2",
            bounded,
            f"alpha = {with_interval(alpha)} per group; {100 * share:.1f} % of the held-out pairs lie under the bound, "
            f"the worst exceeds it {ratio:.2f} times",
        ),
        Claim(
            f"Influence decays exponentially with temporal distance ({name}, trained{faster}).",
            "Fig. 3",
            shape,
            f"best model: {winner} (in {100 * wins:.0f} % of resamples), AICc above it: {above}; finite "
            f"support ends at {support:.0f} groups; distances 0 to {trained['distances'][-1]}",
        ),
        Claim(
            f"Training creates temporal locality: with random weights more of the influence lies far away ({name}).",
            "ours",
            created,
            f"share of the squared influence beyond D = 1: untrained {with_interval(before)}, trained "
            f"{with_interval(after)}",
        ),
    ]


def course_claim(course: dict[int, dict[str, Any]]) -> Claim:
    """What a training run did to the share of the influence beyond D = 1; keys are optimiser steps."""
    shares = {step: fitted["share_beyond"]["1"] for step, fitted in sorted(course.items())}
    first, last = next(iter(shares.values())), list(shares.values())[-1]
    verdict: Verdict = "holds" if last[2] < first[1] else "fails" if last[1] > first[2] else "undecided"
    return Claim(
        "Temporal locality comes about in the first steps of training.",
        "ours",
        verdict,
        "share of the squared influence beyond D = 1 by optimiser step: "
        + ", ".join(f"{step}: {with_interval(share)}" for step, share in shares.items()),
    )
