"""Verdicts on the statements of Sec. 3.2 about the truncation error."""

from __future__ import annotations

from typing import Any

from analysis.bounds.summary import RULES, TOLERANCES
from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.tables import with_interval

CORRECTION = "; correction: D >= log(C G / (eps (1 - exp(-alpha))))/alpha - 1"


def claims(name: str, summary: dict[str, Any]) -> list[Claim]:
    """Verdicts on the three statements for one decoder."""
    bounds, rules = summary["bounds"], summary["rules"]

    def numbers(bound: str) -> str:
        b = bounds[bound]
        ratio = b["bound_over_error_geometric_mean"]
        tight = f", bound / error {_times(ratio)} (least {b['bound_over_error_smallest']:.2g})" if ratio else ""
        return f"held in {100 * b['share_held']:.1f} % of {b['cases']} cases{tight}"

    a: Verdict = "holds" if bounds["full_sum"]["share_held"] == 1 else "fails"
    share = bounds["geometric_tail"]["share_held"]
    b: Verdict = "undecided" if share is None else "holds" if share == 1 else "fails"
    found = [
        Claim(
            f"The truncation error is at most the sum over the cut terms of influence times loss gradient ({name}).",
            "Sec. 3.2",
            a,
            numbers("full_sum") + f"; of that, the sizes of the cut terms alone: {numbers('triangle')}",
        )
    ]
    if not rules:
        return found
    alphas = [c["alpha_per_group"] for c in summary["constants"]]
    found.append(
        Claim(
            "The truncation error is at most the geometric tail C G exp(-alpha (D+1)) / (1 - exp(-alpha)), with C and "
            f"alpha from other clips or crops ({name}).",
            "Sec. 3.2",
            b,
            f"{numbers('geometric_tail')}; alpha = {with_interval(mean_interval(alphas))} per group",
        )
    )
    mean, total, withg, right = (rules[k] for k in (RULES[3], RULES[4], RULES[2], RULES[1]))
    excess = right["groups_too_many"][0]
    same = mean["share_safe"][0] == total["share_safe"][0] == 1
    fixed = right["share_safe"][0] == 1
    fix = CORRECTION if fixed and not same else ""
    c: Verdict = "holds" if same else "holds with correction" if fixed else "fails"
    found.append(
        Claim(
            f"D >= log(C/eps)/alpha is enough for tolerance eps ({name}{fix}).",
            "Sec. 3.2",
            c,
            "share of cases in which the rule's distance was enough (groups more than truly needed; share in which it "
            "asked for no truncation at all): as printed, "
            f"loss as a mean over pixels {_rule(mean)}; as printed, loss as a sum {_rule(total)}; "
            f"with G {_rule(withg)}; "
            f"corrected {_rule(right)}; full sum (a) {_rule(rules[RULES[0]])}; eps is "
            f"{', '.join(map(str, TOLERANCES))} of the gradient of each latent group",
        )
    )
    measured = rules[RULES[5]]
    found.append(
        Claim(
            "The distance is better chosen by measuring: one group more than other clips or crops needed for the same "
            f"relative tolerance is enough in 95 % of cases, and smaller than the bound's ({name}).",
            "ours",
            "holds" if measured["share_safe"][0] >= 0.95 and measured["groups_too_many"][0] < excess else "fails",
            f"measured elsewhere {_rule(measured)}; corrected bound {_rule(right)} (in the same terms as above)",
        )
    )
    return found


def _times(triple: list[float]) -> str:
    return "{:.2g} [{:.2g}, {:.2g}]".format(*triple)


def _rule(row: dict[str, Any]) -> str:
    return (
        f"{100 * row['share_safe'][0]:.0f} % ({row['groups_too_many'][0]:+.1f}; whole video in "
        f"{100 * row['share_whole_video'][0]:.0f} %)"
    )
