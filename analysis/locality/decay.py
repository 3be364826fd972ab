"""How does influence decay with temporal distance? Three models, compared by information criterion.

Every model is linear in its parameters once the logarithm is taken, ``log I(d) = log C + b f(d)``:

- exponential ``C exp(-alpha d)``, the paper's temporal locality (arXiv 2603.17812, Sec. 3.2): f = -d, b = alpha;
- power law ``C (1 + d)^-p``: f = -log(1 + d), b = p;
- finite support ``C (1 - d / S)^q`` for d < S, zero from S on: f = log(1 - d / S), b = q, and S is searched.

The criterion is Akaike's with its correction for few points (AICc); smaller is better.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from suite.bootstrap import mean_interval

Floats = NDArray[np.float64]
MODELS = ("exponential", "power law", "finite support")


@dataclass(frozen=True)
class Fit:
    """A fitted model: ``constant`` is C, ``rate`` is alpha, p or q, ``support`` is S (None but for finite support)."""

    model: str
    constant: float
    rate: float
    support: float | None
    aicc: float

    def __call__(self, distance: Floats) -> Floats:
        """The influence at these distances."""
        d = np.asarray(distance, dtype=np.float64)
        if self.support is not None:
            return self.constant * np.clip(1 - d / self.support, 0, None) ** self.rate
        return self.constant * (np.exp(-self.rate * d) if self.model == "exponential" else (1 + d) ** -self.rate)


def fit(model: str, distance: Sequence[float] | Floats, influence: Sequence[float] | Floats) -> Fit:
    """Least squares on the logarithm of positive influences.

    Raises:
        ValueError: an influence that is not positive, fewer than three points, or an unknown model.
    """
    d, y = np.asarray(distance, dtype=np.float64), np.asarray(influence, dtype=np.float64)
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got '{model}'.")
    if len(d) < 3 or not (y > 0).all():
        raise ValueError(f"A fit of decay needs three or more positive influences, got {y.tolist()}.")
    if model == "finite support":
        candidates = d.max() + np.geomspace(0.05, 20 * d.max() + 1, 240)
        lines = _lines(np.log(1 - d / candidates[:, None]), np.log(y))
        best = int(lines.squares.argmin())
        support = float(candidates[best])
    else:
        lines = _lines((-d if model == "exponential" else -np.log1p(d))[None], np.log(y))
        best, support = 0, None
    intercept, rate, squares = (float(values[best]) for values in lines)
    count, parameters = len(d), 3 + (support is not None)  # the variance is one of them
    left = count - parameters - 1
    aicc = count * np.log(max(squares, 1e-24) / count) + 2 * parameters
    aicc += 2 * parameters * (parameters + 1) / left if left > 0 else np.inf
    return Fit(model, float(np.exp(intercept)), rate, support, float(aicc))


class _Lines(NamedTuple):
    """Least-squares lines, one for each row: intercept, slope and the sum of squared residuals [rows]."""

    intercept: Floats
    slope: Floats
    squares: Floats


def _lines(f: Floats, log_y: Floats) -> _Lines:
    """``log_y`` [points] as a line in every row of ``f`` [rows, points]."""
    centred = f - f.mean(1, keepdims=True)
    slope = centred @ log_y / np.square(centred).sum(1)
    intercept = log_y.mean() - slope * f.mean(1)
    return _Lines(intercept, slope, np.square(log_y - intercept[:, None] - slope[:, None] * f).sum(1))


@dataclass(frozen=True)
class Comparison:
    """The three fits to the mean curve, and how they fare when clips and samples are drawn again.

    Args:
        alpha, log_constant: mean and 95 % interval over samples (clips as clusters) of the exponential's parameters.
        wins: share of bootstrap resamples in which each model has the smallest AICc.
    """

    fits: dict[str, Fit]
    alpha: tuple[float, float, float]
    log_constant: tuple[float, float, float]
    wins: dict[str, float]

    @property
    def winner(self) -> str:
        return min(self.fits.values(), key=lambda f: f.aicc).model

    def lead(self, model: str) -> float:
        """How far the AICc of a model lies above the best; 0 for the winner."""
        return self.fits[model].aicc - self.fits[self.winner].aicc


def compare(
    distance: Sequence[float] | Floats,
    curves: Sequence[Sequence[float]] | Floats,
    clips: Sequence[Hashable],
    resamples: int = 500,
    seed: int = 0,
) -> Comparison:
    """Fit the models to curves [samples, distances] of positive influences.

    The models are compared on the geometric mean curve. Its points are not independent (neighbouring distances share
    noise), so the criterion alone says too much: ``wins`` repeats the comparison on resampled clips and samples.
    """
    data = np.asarray(curves, dtype=np.float64)
    single = [fit("exponential", distance, curve) for curve in data]
    fits = {m: fit(m, distance, np.exp(np.log(data).mean(0))) for m in MODELS}
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(clips))
    members = [[k for k, c in enumerate(clips) if c == name] for name in names]
    wins = dict.fromkeys(MODELS, 0)
    for _ in range(resamples):
        drawn = [rng.choice(members[c], len(members[c])) for c in rng.integers(len(names), size=len(names))]
        mean = np.exp(np.log(data[np.concatenate(drawn)]).mean(0))
        wins[min(MODELS, key=lambda m: fit(m, distance, mean).aicc)] += 1
    return Comparison(
        fits,
        mean_interval([f.rate for f in single], clips),
        mean_interval([float(np.log(f.constant)) for f in single], clips),
        {m: n / resamples for m, n in wins.items()},
    )
