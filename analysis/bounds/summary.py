"""Whether the bounds held, how tight they were, and which distances the rules choose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from analysis.bounds.truncation import (
    Case,
    corrected_rule,
    fitted,
    full_sum,
    geometric_tail,
    measured_rule,
    paper_rule,
    smallest_enough,
    triangle,
)
from analysis.real_clips import left_out_together
from suite.bootstrap import mean_interval

TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # relative to ||g_j||

ROUNDING = 1e-4  # float32 errors relative to ||g_j|| below which a measured error is rounding, and has no tightness

RULES = (
    "full sum",
    "corrected",
    "paper, with G",
    "paper, loss as a mean",
    "paper, loss as a sum",
    "measured elsewhere",
)

BOUNDS = ("full_sum", "triangle", "geometric_tail")


def judge(case: Case, constant: float, alpha: float, frames_scale: float = 1.0) -> dict[str, Any]:
    """Whether each bound held at each distance, how tight it was, and which distances the rules choose.

    Args:
        frames_scale: multiplies the loss, as going from a mean to a sum over pixels does. Errors and bounds scale with
            it; the paper's rule, which has no G in it, does not know of it.
    """
    count = len(case.error)
    distance = np.arange(count - 1, dtype=float)  # at the last distance nothing is cut
    error, largest = case.error[:-1], float(case.adjoint.max())
    bounds = {
        "full_sum": full_sum(case)[:-1],
        "triangle": triangle(case)[:-1],
        "geometric_tail": geometric_tail(constant, alpha, largest, distance) if alpha > 0 else None,
    }
    noise = ROUNDING * case.gradient
    result: dict[str, Any] = {"bounds": {}, "rules": []}
    for name, bound in bounds.items():
        held = [bool(e <= b + noise * 1e-2) for e, b in zip(error, bound)] if bound is not None else []
        tight = [float(b / e) for e, b in zip(error, bound) if e > noise] if bound is not None else []
        result["bounds"][name] = {"held": held, "tightness": tight}
    if alpha <= 0:
        return result
    for relative in TOLERANCES:
        eps = relative * case.gradient
        chosen = {
            "truly enough": smallest_enough(case.error, eps),
            "full sum": smallest_enough(full_sum(case), eps),
            "corrected": corrected_rule(constant, alpha, largest, eps),
            "paper, with G": paper_rule(constant * largest, alpha, eps),
            "paper, loss as a mean": paper_rule(constant, alpha, eps),
            "paper, loss as a sum": paper_rule(constant, alpha, eps * frames_scale),
        }
        result["rules"].append({"relative_tolerance": relative, "last": count - 1, **chosen})
    return result


def summarise(samples: list[dict[str, Any]], losses: list[str], elements: int) -> dict[str, Any]:
    """Judge every case under constants from the other clips (or crops, where there is one clip)."""
    key = left_out_together(samples)
    judged, of_clip, constants = [], [], []
    for sample in samples:
        others = [s for s in samples if key(s) != key(sample)] or samples
        constant, alpha = fitted([c for s in others for c in cases_of(s)[0]])
        constants.append({"clip": sample["clip"], "crop": sample["crop"], "C": constant, "alpha_per_group": alpha})
        for k, (name, cases) in enumerate(zip(losses, cases_of(sample), strict=True)):
            known = [c for s in others for c in cases_of(s)[k]]
            for j, case in zip(sample["latent_groups"], cases, strict=True):
                row = {"loss": name, "j": j, **judge(case, constant, alpha, elements)}
                for rule in row["rules"]:
                    rule["measured elsewhere"] = measured_rule(known, rule["relative_tolerance"])
                judged.append(row)
                of_clip.append(sample["clip"])
    bounds = {}
    for name in BOUNDS:
        held = [h for row in judged for h in row["bounds"][name]["held"]]
        pairs = [(t, c) for row, c in zip(judged, of_clip, strict=True) for t in row["bounds"][name]["tightness"]]
        logs = [math.log10(max(t, 1e-300)) for t, _ in pairs]
        interval = mean_interval(logs, [c for _, c in pairs]) if logs else None
        bounds[name] = {
            "cases": len(held),
            "share_held": float(np.mean(held)) if held else None,
            "bound_over_error_geometric_mean": [10**x for x in interval] if interval else None,
            "bound_over_error_smallest": min((t for t, _ in pairs), default=None),
        }
    chosen = [{**rule, "clip": c} for row, c in zip(judged, of_clip, strict=True) for rule in row["rules"]]
    rules = {}
    for name in RULES if chosen else ():
        safe = [float(r[name] >= r["truly enough"]) for r in chosen]
        excess = [float(r[name] - r["truly enough"]) for r in chosen]
        whole = [float(r[name] >= r["last"]) for r in chosen]
        where = [r["clip"] for r in chosen]
        rules[name] = {
            "cases": len(chosen),
            "share_safe": list(mean_interval(safe, where)),
            "groups_too_many": list(mean_interval(excess, where)),
            "share_whole_video": list(mean_interval(whole, where)),
        }
    by_tolerance = [
        {"relative_tolerance": t}
        | {
            k: list(mean_interval([float(r[k]) for r in chosen if r["relative_tolerance"] == t],
                                  [r["clip"] for r in chosen if r["relative_tolerance"] == t]))
            for k in ("truly enough", *RULES)
        }
        for t in (TOLERANCES if chosen else ())
    ]  # fmt: skip
    return {"constants": constants, "bounds": bounds, "rules": rules, "distance_by_tolerance": by_tolerance}


def cases_of(sample: dict[str, Any]) -> list[list[Case]]:
    """The cases of a sample as they were measured."""

    def case(fields: dict[str, Any]) -> Case:
        arrays: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Case(**arrays)

    return [[case(fields) for fields in of_loss] for of_loss in sample["cases"]]
