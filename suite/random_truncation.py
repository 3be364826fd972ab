"""Estimators of the gradient that draw at random, and their exact variances.

- Randomised truncation: one random distance R, and the term of distance d weighted by 1 / P(R >= d) where R >= d.
  Unbiased for the full gradient ("Russian roulette"; Tallec and Ollivier 2017 for BPTT, Beatson and Adams 2019 for the
  best distribution of R).
- ARTBP (Tallec and Ollivier 2017, "Unbiasing truncated backpropagation through time"): each border between groups is
  cut with probability 1 - c, and what crosses a border is weighted by 1 / c. A latent's terms then have the same joint
  law as under a geometric R, hence the same squared error at the decoder's input, at the cost of plain chunks.
- Sampled losses (``chopgrad.Sampled``): the losses of n of T groups drawn without replacement, weighted by T / n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def distance_terms(pairs: Tensor) -> Tensor:
    """[d, j, ...] from pairs [i, j, ...]: dL_{j+d}/dz_j, zero beyond the video. Their sum over d is the gradient."""
    count = len(pairs)
    terms = torch.zeros_like(pairs)
    for d in range(count):
        j = torch.arange(count - d)
        terms[d, : count - d] = pairs[j + d, j]
    return terms


def loss_terms(pairs: Tensor, distance: int) -> Tensor:
    """[i, j, ...]: what the loss of group i gives to the latents under ``Chop(distance)``."""
    i, j = torch.arange(len(pairs))[:, None], torch.arange(len(pairs))[None, :]
    kept = ((i >= j) & (i - j <= distance)).to(pairs)
    return pairs * kept.reshape(*kept.shape, *[1] * (pairs.ndim - 2))


def gram(terms: Tensor) -> Tensor:
    """[k, k] inner products of terms [k, ...], in float64."""
    flat = terms.flatten(1).double()
    return flat @ flat.T


def randomised(terms: Tensor, survival: Tensor, drawn: int) -> Tensor:
    """The estimate from terms [d, ...] when R = ``drawn``: sum over d <= R of terms[d] / P(R >= d)."""
    weights = (1 / survival[: drawn + 1]).to(terms)
    return torch.einsum("d,d...->...", weights, terms[: drawn + 1])


def randomised_variance(products: Tensor, survival: Tensor) -> float:
    """E|estimate - g|^2 from the Gram matrix of the distance terms.

    E of the product of terms d and e is <a_d, a_e> / P(R >= min(d, e)).
    """
    d = torch.arange(len(products))
    nearer = torch.minimum(d[:, None], d[None, :])
    return (products * (1 / survival.double()[nearer] - 1)).sum().item()


def geometric(mean: float, groups: int) -> Tensor:
    """P(R >= d) = c^d for d < groups, with c such that the mean of R, ended by the video, is ``mean``.

    Raises:
        ValueError: the mean is not between 0 and groups - 1.
    """
    if not 0 < mean <= groups - 1:
        raise ValueError(f"The mean distance must be above 0 and at most {groups - 1}, got {mean}.")
    low, high = 0.0, 1.0
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if sum(c**d for d in range(1, groups)) < mean else (low, c)
    return torch.tensor([high**d for d in range(groups)], dtype=torch.float64)


def best_survival(products: Tensor, mean: float) -> Tensor:
    """P(R >= d) of least variance at mean distance ``mean``, for the Gram matrix of (average) distance terms.

    The variance is sum_k S_k / P(R >= k) up to a constant, with S_k = |tail_k|^2 - |tail_{k+1}|^2 and tail_k the sum of
    the terms from k on; P must not increase. Without that constraint P ~ sqrt(S); with it, runs of k are pooled
    (isotonic regression on S, then the root), and a multiplier is found that gives the mean.
    """
    groups = len(products)
    if not 0 < mean <= groups - 1:
        raise ValueError(f"The mean distance must be above 0 and at most {groups - 1}, got {mean}.")
    tails = [products[k:, k:].sum().item() for k in range(groups)] + [0.0]
    pooled: list[tuple[float, int]] = []
    for k in range(1, groups):
        value, size = tails[k] - tails[k + 1], 1
        while pooled and pooled[-1][0] < value:
            other, count = pooled.pop()
            value, size = (value * size + other * count) / (size + count), size + count
        pooled.append((value, size))
    scores = np.sqrt(np.maximum(np.repeat([v for v, _ in pooled], [s for _, s in pooled]), 1e-12 * tails[0]))
    low, high = 0.0, groups / scores.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * scores).sum() < mean else (low, middle)
    return torch.tensor([1.0, *np.minimum(1, high * scores)], dtype=torch.float64)


def sampled_variance(products: Tensor, count: int) -> float:
    """E|estimate - g|^2 of ``Sampled(count)`` from the Gram matrix of the loss terms: simple random sampling."""
    groups = len(products)
    if not 1 <= count <= groups:
        raise ValueError(f"count must be between 1 and {groups}, got {count}.")
    if groups == 1:
        return 0.0
    spread = (products.diagonal().sum() - products.sum() / groups) / (groups - 1)
    return (groups**2 / count * (1 - count / groups) * spread).item()


def artbp(pairs: Tensor, cuts: Sequence[bool], keep: float) -> Tensor:
    """[j, ...]: the ARTBP estimate for one draw; ``cuts[k]`` says whether the border before group k + 1 is cut."""
    crossed = np.concatenate([[0], np.cumsum(cuts)])
    result = torch.zeros_like(pairs[0])
    for i in range(len(pairs)):
        for j in range(i + 1):
            if crossed[i] == crossed[j]:
                result[j] += pairs[i, j] / keep ** (i - j)
    return result
