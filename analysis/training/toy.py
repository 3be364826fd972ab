"""Descent along truncated gradients on linear problems whose end is known (``analysis.training.biased_descent``)."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from analysis.training.biased_descent import GROUPS, LinearTask, descend
from analysis.training.gaps import DISTANCES, label
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.claims import Claim
from suite.records import Record
from suite.tables import with_interval
from suite.verdicts import below


def toy(folder: Path, seeds: int, steps: int, decay: float, noise: float) -> Record:
    """One kind of linear problem, all distances and seeds; its record lies in ``folder``."""
    settings = {"decay": decay, "noise": noise, "seeds": seeds, "steps": steps, "groups": GROUPS}

    def compute() -> dict[str, Any]:
        task = LinearTask.draw(seeds, decay, noise)
        rows = []
        for distance in DISTANCES:
            d = descend(task, GROUPS - 1 if distance is None else distance, steps)
            powers = torch.arange(steps + 1)[:, None]
            promised = d.rate**powers * d.start + 1e-12 * d.start
            shown = sorted({round(steps ** (k / 40)) for k in range(41)})
            rows.append(
                {
                    "distance": distance,
                    "relative_gap": list(mean_interval((d.gap / d.start).tolist())),
                    "relative_bound": [None if math.isinf(x) else x for x in (d.bound / d.start).tolist()],
                    "relative_gaps": (d.gap / d.start).tolist(),
                    "descent_gaps": (d.descent[-1] / d.start).tolist(),
                    "adam_gaps": (d.adam[-1] / d.start).tolist(),
                    "relative_bias": d.relative_bias.tolist(),
                    "converges": int(d.converges.sum()),
                    "within_rate": int((d.descent <= promised).all(0).sum()),
                    "curve_steps": shown,
                    "curve": [(d.descent[t] / d.start).mean().item() for t in shown],
                }
            )
        return {"rows": rows, "claims": [asdict(c) for c in toy_claims(rows, decay, noise)]}

    return run_case(folder / f"training_bias-toy-decay{decay}-noise{noise}.json", settings, compute)


def toy_claims(rows: list[dict[str, Any]], decay: float, noise: float) -> list[Claim]:
    """What the theory promises for this problem against what descent did."""
    cut = [r for r in rows if r["distance"] is not None]
    covered = [(r, k) for r in cut for k, q in enumerate(r["relative_bias"]) if q < 1]
    gaps = ", ".join(f"{label(r['distance'])} {r['relative_gap'][0]:.1e}" for r in cut)
    if not covered:
        return []
    if noise == 0:
        worst = max(r["descent_gaps"][k] for r, k in covered)
        slow = sum(r["within_rate"] for r in rows)
        return [
            Claim(
                "When all clips can be fitted exactly and the relative bias is below 1, truncated training reaches the "
                "optimum (Ajalloeian and Stich 2020 with zeta = 0).",
                "ours",
                "holds" if worst < 1e-9 else "fails",
                f"decay {decay}: "
                f"largest remaining gap {worst:.1e} of the gap at the start, over {len(covered)} runs; promised rate "
                f"kept in {slow} of {sum(len(r['relative_bias']) for r in rows)} runs",
            )
        ]
    ratios = sorted(r["relative_bound"][k] / r["descent_gaps"][k] for r, k in covered)
    adam = [a / g for r in cut for a, g in zip(r["adam_gaps"], r["relative_gaps"], strict=True)]
    mean, low, high = mean_interval(adam)
    return [
        Claim(
            "When clips cannot be fitted exactly, truncated training ends within zeta^2 / (2 mu (1 - m)) of the "
            "least loss (Ajalloeian and Stich 2020).",
            "ours",
            "holds" if ratios[0] >= 1 else "fails",
            f"decay {decay}: "
            f"bound / gap between {ratios[0]:.1f} and {ratios[-1]:.1f}, median {ratios[len(ratios) // 2]:.1f}, over "
            f"{len(covered)} runs; gap relative to the start: {gaps}",
        ),
        Claim(
            "An optimiser that rescales gradients (Adam) removes the effect of truncation on where training ends.",
            "Sec. 3.3",
            below([(mean, low, high)], 0.5),
            f"decay {decay}: gap with Adam / gap of gradient descent {with_interval((mean, low, high))}",
        ),
    ]
