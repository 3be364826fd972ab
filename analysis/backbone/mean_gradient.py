"""Statistics of a mean gradient under truncation: error measures, Adam's update, and the limit of many clips.

Everything works on per-clip gradients [clips, parameters], so that clips can be resampled without another decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ADAM = (0.9, 0.999, 1e-8)
MEASURES = {
    "normalised_mae": "normalised MAE",
    "cosine": "cosine",
    "relative_error": "relative error",
    "best_scaled_error": "best-scaled error",
    "tensor_scaled_error": "best-scaled per tensor",
}
ADAM_RESAMPLES = 60
CHUNK = 64
"""Resamples at a time: each is as large as the backbone."""


@dataclass(frozen=True)
class Gradients:
    """Per-clip gradients of one data set.

    Attributes:
        truncated: [clips, parameters] per (block, distance).
        full: the same of full back-propagation.
        sizes: parameters of each tensor of the backbone.
        sources: what each clip was cut from.
    """

    truncated: dict[tuple[int, int], Tensor]
    full: Tensor
    sizes: list[int]
    sources: list[str]


def compare(chopped: Tensor, full: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """The measures for each row of [rows, parameters]."""
    inner = lambda a, b: torch.stack([(x * y).sum(1) for x, y in zip(a.split(sizes, 1), b.split(sizes, 1))], 1)  # noqa: E731
    cross, own, reference = inner(chopped, full), inner(chopped, chopped), inner(full, full)
    total = reference.sum(1)
    cosine = (cross.sum(1) / (own.sum(1) * total).sqrt()).clamp(-1, 1)
    explained = torch.where(own > 0, cross**2 / own, 0.0)
    return {
        "normalised_mae": (chopped - full).abs().mean(1) / full.abs().mean(1),
        "cosine": cosine,
        "relative_error": ((chopped - full).square().sum(1) / total).sqrt(),
        "best_scaled_error": (1 - cosine**2).sqrt(),
        "tensor_scaled_error": (1 - explained.sum(1) / total).clamp(min=0).sqrt(),
    }


def adam_updates(batches: Tensor, full_batches: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Adam's last update (truncated, full), each [1, parameters], when gradients [steps, parameters] come one by one.

    ``warmed``: moments from full gradients and only the last step truncated. ``own``: every step truncated.
    """

    def last_update(steps: Tensor) -> Tensor:
        b1, b2, eps = ADAM
        n = len(steps)
        weights = lambda b: (1 - b) * b ** torch.arange(n - 1, -1, -1).to(steps) / (1 - b**n)  # noqa: E731
        return (weights(b1) @ steps / ((weights(b2) @ steps**2).sqrt() + eps))[None]

    reference = last_update(full_batches)
    warmed = last_update(torch.cat([full_batches[:-1], batches[-1:]]))
    return {"warmed": (warmed, reference), "own": (last_update(batches), reference)}


def mean_products(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """[resamples]: unbiased inner product of the population means of a and b, [clips, parameters] each.

    The mean of the products of different clips (a U-statistic): a clip's own noise never meets itself.
    """
    counts = counts.double()
    gram = (a @ b.T).double()
    pairs = counts.sum(1) ** 2 - counts.square().sum(1)
    return (((counts @ gram) * counts).sum(1) - counts.square() @ gram.diagonal()) / pairs


def limits(chopped: Tensor, full: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(relative error, cosine) of the population means, each [resamples]; NaN where the mean gradient drowns in noise.

    This is what is left of the error when one averages over infinitely many clips. A squared error below zero counts as
    none.

    Args:
        chopped, full: [clips, parameters].
        counts: [resamples, clips] how often each clip counts.
    """
    error = chopped - full
    squared = [mean_products(x, x, counts) for x in (error, full, chopped)]
    squared[0] = squared[0].clamp(min=0)
    undefined = (squared[1] <= 0) | (squared[2] <= 0)
    cosine = mean_products(chopped, full, counts) / (squared[1] * squared[2]).clamp(min=0).sqrt()
    error = torch.where(undefined, math.nan, (squared[0] / squared[1]).sqrt())
    return error, torch.where(undefined, math.nan, cosine.clamp(max=1))


def bootstrap_draws(sources: list[str], resamples: int, seed: int) -> list[np.ndarray]:
    """Indices of clips: all of them in random order, then bootstrap draws of sources and of their clips."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero([s == name for s in sources]) for name in dict.fromkeys(sources)]
    draws = [rng.permutation(len(sources))]
    for _ in range(resamples):
        picks = rng.integers(len(members), size=len(members))
        draws.append(rng.permutation(np.concatenate([rng.choice(members[k], len(members[k])) for k in picks])))
    return draws


def bootstrap_counts(sources: list[str], resamples: int, seed: int) -> Tensor:
    """[1 + resamples, clips] how often each clip counts; once each in the first row."""
    return _counts(bootstrap_draws(sources, resamples, seed), len(sources)).double()


def _counts(draws: list[np.ndarray], clips: int) -> Tensor:
    return torch.stack([torch.from_numpy(np.bincount(d, minlength=clips)).float() for d in draws])


def summarise(g: Gradients, resamples: int, seed: int) -> dict[str, Any]:
    """All measures of the mean gradient with 95 % intervals, and the dependence on the number of clips.

    Cost: (resamples x clips x parameters) operations per truncation.
    """
    draws = bootstrap_draws(g.sources, resamples, seed)
    counts = _counts(draws, len(g.full))
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(g.full), generator=generator) for _ in range(8)])
    return {
        "rows": [
            {"block": block, "distance": distance}
            | _mean_measures(chopped, g, counts)
            | _adam_measures(chopped, g, draws[: 1 + ADAM_RESAMPLES])
            | _limit_measures(chopped, g.full, counts)
            for (block, distance), chopped in g.truncated.items()
        ],
        "by_clips": _by_clips(g, orders),
    }


def _mean_measures(chopped: Tensor, g: Gradients, counts: Tensor) -> dict[str, list[float]]:
    parts = []
    for rows in counts.split(CHUNK):
        weights = rows / rows.sum(1, keepdim=True)
        parts.append(compare(weights @ chopped, weights @ g.full, g.sizes))
    values = {name: torch.cat([p[name] for p in parts]) for name in MEASURES}
    for name, scaled in (("one_scale", "best_scaled_error"), ("tensor_scales", "tensor_scaled_error")):
        values[f"removed_by_{name}"] = 1 - (values[scaled] / values["relative_error"]) ** 2
    return {name: _interval(x) for name, x in values.items()}


def _adam_measures(chopped: Tensor, g: Gradients, draws: list[np.ndarray]) -> dict[str, list[float]]:
    """The update after about 16 steps over the clips, in the order drawn."""
    batch = max(1, len(g.full) // 16)
    found: dict[str, list[float]] = {}
    for draw in draws:
        steps = len(draw) // batch
        rows = torch.from_numpy(draw[: steps * batch])
        shuffled = [x[rows].unflatten(0, (steps, batch)).mean(1) for x in (chopped, g.full)]
        for kind, (update, reference) in adam_updates(*shuffled).items():
            for name, value in compare(update, reference, g.sizes).items():
                found.setdefault(f"adam_{kind}_{name}", []).append(value.item())
    return {name: _interval(torch.tensor(x)) for name, x in found.items()}


def _limit_measures(chopped: Tensor, full: Tensor, counts: Tensor) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = {}
    for name, values in zip(("limit_relative_error", "limit_cosine"), limits(chopped, full, counts), strict=True):
        finite = values[~values.isnan()]
        # Where resamples are undefined too often, the mean gradient is not told from noise: no number is honest.
        found[name] = None if values[0].isnan() or len(finite) < 0.95 * len(values) else _interval(finite)
    return found


def _by_clips(g: Gradients, orders: Tensor) -> list[dict[str, Any]]:
    """Error of means over disjoint sets of n clips, and the noise of the full gradient's mean over as many."""
    rows = []
    n = 1
    while n <= len(g.full):
        sets = [o[k : k + n] for o in orders for k in range(0, len(o) - n + 1, n)]
        means = torch.stack([g.full[s].mean(0) for s in sets])
        row: dict[str, Any] = {"clips": n}
        if n > 1:
            halves = torch.stack([(g.full[s[: n // 2]].mean(0) - g.full[s[n // 2 :]].mean(0)).norm() for s in sets])
            row["noise"] = (halves / 2 / means.norm(dim=1)).mean().item()
        for (block, distance), chopped in g.truncated.items():
            values = compare(torch.stack([chopped[s].mean(0) for s in sets]), means, g.sizes)
            row[f"{block}/{distance}"] = {
                k: values[k].mean().item() for k in ("normalised_mae", "relative_error", "cosine")
            }
        rows.append(row)
        n *= 2
    return rows


def _interval(values: Tensor) -> list[float]:
    """[estimate, low, high] from the estimate and its bootstrap replicates."""
    low, high = np.quantile(values[1:].numpy(), [0.025, 0.975])
    return [float(values[0]), float(low), float(high)]
