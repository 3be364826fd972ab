"""How influence falls off with distance: curves, fits, and a bound that is tested on clips left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.locality.decay import Fit, compare, fit
from analysis.real_clips import left_out_together
from suite.bootstrap import mean_interval


def curve(sample: dict[str, Any], first: int = 1) -> dict[int, float]:
    """Distance -> geometric mean over the outputs of the Frobenius influence, without latents before ``first``."""
    logs: dict[int, list[float]] = {}
    for i, row in zip(sample["outputs"], sample["frobenius"], strict=True):
        for j in range(first, i + 1):
            if row[j] > 0:
                logs.setdefault(i - j, []).append(float(np.log(row[j])))
    return {d: float(np.exp(np.mean(v))) for d, v in sorted(logs.items())}


def beyond(sample: dict[str, Any], distance: int) -> float:
    """Share of the influence's squares on the last group that lies beyond a distance."""
    row = np.square(sample["frobenius"][-1])
    far = row[: max(0, len(row) - 1 - distance)]
    return float(far.sum() / row.sum())


def held_out_bound(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each clip (each crop, with one clip only): C and alpha of the others, and how its own pairs fare under them.

    alpha is the mean of the others' fits; C is then the smallest that bounds every pair of theirs.
    """
    key = left_out_together(samples)
    rows = []
    for left_out in dict.fromkeys(map(key, samples)):
        others = [s for s in samples if key(s) != left_out]
        if not others:
            continue
        alpha = float(np.mean([_exponential(s).rate for s in others]))
        constant = max(x * np.exp(alpha * d) for s in others for d, x in _pairs(s))
        excess = [x / (constant * np.exp(-alpha * d)) for s in samples if key(s) == left_out for d, x in _pairs(s)]
        rows.append(
            {
                "left_out": left_out if isinstance(left_out, str) else f"{left_out[0]}, crop {left_out[1]}",
                "alpha": alpha,
                "C": float(constant),
                "pairs": len(excess),
                "share_held": float(np.mean([e <= 1 for e in excess])),
                "largest_ratio": float(max(excess)),
            }
        )
    return rows


def _pairs(sample: dict[str, Any]) -> list[tuple[int, float]]:
    return [(i - j, x) for i, row in zip(sample["outputs"], sample["frobenius"]) for j, x in enumerate(row)]


def _exponential(sample: dict[str, Any]) -> Fit:
    points = curve(sample)
    return fit("exponential", list(points), list(points.values()))


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Fits, intervals, held-out bound and the shares beyond distances 0, 1, 2, 4, 8."""
    curves = [curve(s) for s in samples]
    distances = sorted(set.intersection(*(set(c) for c in curves)))
    clips = [s["clip"] for s in samples]
    comparison = compare(distances, [[c[d] for d in distances] for c in curves], clips)
    return {
        "distances": distances,
        "mean_curve": {str(d): list(mean_interval([c[d] for c in curves], clips)) for d in distances},
        "alpha_per_group": list(comparison.alpha),
        "log_C": list(comparison.log_constant),
        "models": {
            m: {
                "C": f.constant,
                "rate": f.rate,
                "support_groups": f.support,
                "aicc_above_best": comparison.lead(m) if np.isfinite(comparison.lead(m)) else None,
                "bootstrap_wins": comparison.wins[m],
            }
            for m, f in comparison.fits.items()
        },
        "winner": comparison.winner,
        "held_out_bound": held_out_bound(samples),
        "share_beyond": {str(d): list(mean_interval([beyond(s, d) for s in samples], clips)) for d in (0, 1, 2, 4, 8)},
    }
