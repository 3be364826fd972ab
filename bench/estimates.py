"""What is measured of a gradient that is drawn anew at every call (``chopgrad.Sampled``).

With g the gradient of full back-propagation and b the estimate, over all draws:

- relative error of the mean, |E b - g| / |g|: the bias, which is that of the strategy inside;
- relative variance, E|b - E b|^2 / |g|^2: what averaging over calls removes;
- relative error of one call, the root of E|b - g|^2 / |g|^2; the same for the best fixed factor; and the cosine that
  goes with it, <E b, g> / (root of E|b|^2 times |g|).

They are exact sums over all draws, by the variance of sampling without replacement from the gradients of the single
losses, not averages of some calls.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from bench.cases import window
from chopgrad import Sampled
from suite.pairwise import truncated
from suite.random_truncation import gram, sampled_variance


def errors_over_draws(method: Sampled, pairs: Tensor) -> dict[str, float]:
    """The measures above; pairs [i, j, ...] of dL_i/dz_j."""
    pairs = pairs.cpu()  # T masked copies of all pairs, and sums that round alike on every card
    count = len(pairs)
    single = torch.eye(count).tolist()
    terms = torch.stack([truncated(pairs, *window(method, count), weights) for weights in single])
    g, mean = (x.sum(0).flatten().double() for x in (pairs, terms))
    square = (g @ g).item()
    variance = sampled_variance(gram(terms), min(method.count, count))
    bias = (mean - g).square().sum().item()
    cosine = min(1.0, (mean @ g).item() / math.sqrt(((mean @ mean).item() + variance) * square))
    error = math.sqrt((bias + variance) / square)
    return {
        "relative_error": error,
        "cosine": cosine,
        "best_scaled_error": math.sqrt(1 - cosine**2),
        "relative_error_of_mean": math.sqrt(bias / square),
        "relative_variance": variance / square,
    }


def seed_of_largest(method: Sampled, groups: int) -> int:
    """A seed with which the next call draws the last groups: no draw needs more memory."""
    last = min(method.count, groups)
    for seed in itertools.count():
        torch.manual_seed(seed)
        if all(method.weights([1.0] * groups)[-last:]):
            return seed
    raise AssertionError
