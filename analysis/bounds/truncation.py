"""Bounds on the truncation error of one latent group, and the rules for D that follow (arXiv 2603.17812, Sec. 3.2).

``analysis/error_bound.py`` says which bound is which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.locality.decay import Floats
from analysis.locality.influence import operator_norms
from chopgrad import CausalDecoder
from suite.pairwise import pairwise_gradients


@dataclass(frozen=True)
class Case:
    """One latent group of one crop under one loss: everything that the bounds need.

    Args:
        influence: ||J_ij|| for i = j, j+1, ... (operator norm); distance is the index.
        adjoint: ||dL_i/dx_i|| for the same groups.
        parts: ||J_ij^T dL_i/dx_i|| for the same groups.
        error: ||g_j - g_j^D|| for D = 0, 1, ...; the last is zero.
        gradient: ||g_j||.
    """

    influence: Floats
    adjoint: Floats
    parts: Floats
    error: Floats
    gradient: float


def full_sum(case: Case) -> Floats:
    """Bound (a) for D = 0, 1, ...: what the cut terms can add up to."""
    return _tails(case.influence * case.adjoint)


def triangle(case: Case) -> Floats:
    """The same with the sizes of the cut terms themselves: only their cancellation is given away."""
    return _tails(case.parts)


def geometric_tail(constant: float, alpha: float, largest_adjoint: float, distance: Floats) -> Floats:
    """Bound (b)."""
    return constant * largest_adjoint * np.exp(-alpha * (distance + 1)) / (1 - math.exp(-alpha))


def paper_rule(constant: float, alpha: float, tolerance: float) -> int:
    """The smallest distance with D >= log(C / eps) / alpha (Sec. 3.2)."""
    return max(0, math.ceil(math.log(constant / tolerance) / alpha - 1e-9))


def corrected_rule(constant: float, alpha: float, largest_adjoint: float, tolerance: float) -> int:
    """The smallest distance at which the geometric tail is at most the tolerance."""
    whole = constant * largest_adjoint / (tolerance * (1 - math.exp(-alpha)))
    return max(0, math.ceil(math.log(whole) / alpha - 1 - 1e-9))


def measured_rule(known: list[Case], relative: float) -> int:
    """One group more than was enough for every known case: no theory, only the truncation error of other clips."""
    return 1 + max(smallest_enough(c.error, relative * c.gradient) for c in known)


def smallest_enough(values: Floats, tolerance: float) -> int:
    """The smallest D from which on all values (errors, or bounds) are within the tolerance."""
    above = np.flatnonzero(values > tolerance)
    return 0 if not above.size else int(above[-1]) + 1


def _tails(terms: Floats) -> Floats:
    """Sums over the terms beyond D, for D = 0, 1, ..."""
    return np.append(np.cumsum(terms[::-1])[::-1][1:], 0.0)


def measure_cases(
    decoder: CausalDecoder, latents: Tensor, target: Tensor, losses: list[Any], js: list[int]
) -> list[list[Case]]:
    """[loss][latent group of js] for one video; the operator norms are shared by the losses.

    Cost: ``pairwise_gradients``, and the operator norm of every pair of the groups js.
    """
    groups = decoder.frame_groups(latents.shape[2])
    count = len(groups)
    norms = operator_norms(decoder, latents, [(i, j) for j in js for i in range(j, count)])
    with torch.no_grad():
        frames = decoder.decode(latents)
    result = []
    for loss_fn, pairs in zip(losses, pairwise_gradients(decoder, latents, target, losses), strict=True):
        adjoint = []
        for group in groups:
            leaf = frames[:, :, group.frames].clone().requires_grad_()
            part = loss_fn(leaf, target[:, :, group.frames]) * (group.frame_count / groups[-1].frames.stop)
            adjoint.append(torch.autograd.grad(part, leaf)[0].double().norm().item())
        cases = []
        for j in js:
            terms = pairs[j:, j].double().flatten(1)
            # Sums from the far end: each is the error when everything nearer is kept.
            cut = [terms[d + 1 :].sum(0).norm().item() for d in range(len(terms))]
            cases.append(
                Case(
                    np.array([norms[i, j] for i in range(j, count)]),
                    np.array(adjoint[j:]),
                    terms.norm(dim=1).cpu().numpy(),
                    np.array(cut),
                    terms.sum(0).norm().item(),
                )
            )
        result.append(cases)
    return result


def fitted(cases: list[Case]) -> tuple[float, float]:
    """(C, alpha): alpha by least squares on the logarithm of the influences, C the smallest that bounds them all."""
    d = np.concatenate([np.arange(len(c.influence)) for c in cases]).astype(float)
    y = np.concatenate([c.influence for c in cases])
    d, y = d[y > 0], y[y > 0]
    alpha = float(-np.polyfit(d, np.log(y), 1)[0])
    return float((y * np.exp(alpha * d)).max()), alpha
