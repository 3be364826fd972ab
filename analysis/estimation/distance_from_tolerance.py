"""A truncation distance that is chosen while training runs (after Aicher, Foti, Fox, UAI 2019).

An experiment and not part of the library: ``analysis.estimation.adaptive`` shows that it costs more than the exact
gradient, and does not keep its tolerance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chopgrad import CausalDecoder, Chop, Exact, FrameGroup, decode, frame_loss

LossFn = Callable[[Tensor, Tensor], Tensor]
HORIZON = 20  # observations over which a running mean goes


class RunningMean:
    """The mean of what was seen, and of about the last ``HORIZON`` values once there are more."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, x: float) -> None:
        self.count = min(self.count + 1, HORIZON)
        self.value += (x - self.value) / self.count


@dataclass
class Decay:
    """Running estimates of how the gradient of one group's loss falls off with distance.

    Attributes:
        squares: for each distance d the running mean of ||dL_i/dz_{i-d}||^2 over the groups i that were probed.
        gradient: running mean over groups of ||dL/dz_j||^2, as the strategy computed it.
        calls: how often a gradient was asked for.
    """

    squares: list[RunningMean] = field(default_factory=list)
    gradient: RunningMean = field(default_factory=RunningMean)
    calls: int = 0

    def add_probe(self, profile: list[float]) -> None:
        """``profile``: ||dL_i/dz_{i-d}|| for d = 0, 1, ..., of one group i. One that is not finite is passed over."""
        if not all(map(math.isfinite, profile)):
            return
        while len(self.squares) < len(profile):
            self.squares.append(RunningMean())
        for mean, norm in zip(self.squares, profile, strict=False):
            mean.add(norm**2)

    def add_gradient(self, norms: list[float]) -> None:
        """``norms``: ||dL/dz_j|| of each group j, as a call computed it; passed over if not finite."""
        square = sum(x**2 for x in norms) / len(norms)
        if math.isfinite(square):
            self.gradient.add(square)

    @property
    def norms(self) -> list[float]:
        """Root mean square of ||dL_i/dz_{i-d}|| for d = 0, 1, ..."""
        return [math.sqrt(mean.value) for mean in self.squares]

    def rate(self) -> float:
        """beta: the factor per frame group by which the norms fall off in the farther half of what was seen."""
        norms = self.norms
        near, far = norms[len(norms) // 2], norms[-1]
        steps = len(norms) - 1 - len(norms) // 2
        if far == 0:
            return 0.0
        return min(1.0, (far / near) ** (1 / steps)) if steps and near else 1.0

    def relative_error(self, distance: int, block: int, groups: int) -> float:
        """Estimated ||g_D - g|| / ||g|| of ``Chop(distance, block)`` on a video of so many frame groups.

        At the latent of group j the error is at most the tail, sum over d > D_j of ||dL_{j+d}/dz_j|| with D_j between
        ``distance`` and ``distance + block - 1`` (triangle inequality). Norms beyond what was seen go on falling by
        ``rate``. The norm of the truncated gradient minus the tail bounds ||g|| from below.
        """
        norms, beta = self.norms, self.rate()
        seen = sum(x**2 for x in norms)
        while len(norms) < groups:
            norms.append(norms[-1] * beta)
        tails = []
        for j in range(groups):
            kept = distance + block - 1 - j % block
            tails.append(sum(norms[kept + 1 : groups - j]))
        tail = math.sqrt(sum(x**2 for x in tails) / groups)
        if tail == 0:
            return 0.0
        norm = math.sqrt(self.gradient.value if self.gradient.count else seen)
        return tail / (norm - tail) if norm > tail else math.inf


@dataclass(frozen=True)
class Adaptive:
    """``Chop`` with the smallest distance whose estimated relative gradient error is within ``tolerance``.

    Every ``probe_every`` calls the gradient of one group's loss alone is followed back over twice the present distance
    (at the first call: as far as ``most``, or the video, goes), which gives the decay of ||dL_i/dz_{i-d}|| with d.
    From its running mean, extrapolated geometrically, comes a bound on the truncation error (Aicher, Foti, Fox 2019,
    "Adaptively truncating backpropagation through time to control gradient bias"). The bound is an estimate: groups
    differ, and the decay drifts while a model trains.

    The value carries its running estimates: use one value per training run, and not the same for two losses.

    Args:
        tolerance: of ||g_D - g|| / ||g|| at the latents, above 0.
        block: as in ``Chop``.
        most: largest distance it may choose (None: no limit); memory grows with the distance.
        probe_every: calls between two probes, at least 1. A probe costs about one decode up to the probed group and
            2D + 1 recomputed backward passes.

    Raises:
        ValueError: a setting is out of range.
    """

    tolerance: float
    block: int = 1
    most: int | None = None
    probe_every: int = 20
    decay: Decay = field(default_factory=Decay, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.tolerance, int | float) and 0 < self.tolerance < math.inf):
            raise ValueError(f"Adaptive: tolerance must be a positive number, got {self.tolerance!r}.")
        for name, value, least in (("most", self.most, 0), ("probe_every", self.probe_every, 1)):
            if value is not None and value < least:
                raise ValueError(f"Adaptive: {name} must be at least {least}, got {value}.")
        self.at(0)  # checks the rest

    def at(self, distance: int) -> Chop:
        """The strategy at one distance."""
        return Chop(distance, self.block)

    def distance(self, groups: int) -> int:
        """The smallest distance that is good enough for a video of so many frame groups."""
        limit = groups - 1 if self.most is None else min(self.most, groups - 1)
        if not self.decay.squares:
            return min(limit, 1)
        good = (d for d in range(limit) if self.decay.relative_error(d, self.block, groups) <= self.tolerance)
        return next(good, limit)

    def loss_gradient(
        self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn
    ) -> tuple[Tensor, Tensor]:
        """One call: the loss as ``chopgrad.frame_loss`` gives it, and its gradient at the latents.

        Args:
            decoder, latents, target, loss_fn: as in ``chopgrad.frame_loss``; the target is the whole video.
        """
        groups = decoder.frame_groups(latents.shape[2])
        calls, self.decay.calls = self.decay.calls, self.decay.calls + 1
        if calls % self.probe_every == 0 and len(groups) > 1:
            limit = len(groups) - 1 if self.most is None else min(self.most + 1, len(groups) - 1)
            span = limit if not self.decay.squares else min(limit, 2 * self.distance(len(groups)) + 1)
            i = random.Random(calls).randrange(span, len(groups))
            self.decay.add_probe(probe(decoder, latents, target, loss_fn, i, span))
        leaf = latents.detach().requires_grad_()
        loss = frame_loss(decoder, leaf, target, loss_fn, self.at(self.distance(len(groups))))
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.decay.add_gradient(group_norms(gradient, groups))
        return loss.detach(), gradient


def probe(decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn, i: int, span: int) -> list[float]:
    """||dL_i/dz_{i-d}|| for d = 0 .. span, of the loss of group i with its share in that of the video."""
    groups = decoder.frame_groups(latents.shape[2])
    near, frames = groups[i - span : i + 1], groups[i].frames
    leaf = latents.detach().requires_grad_()
    decoded = decode(decoder, leaf, Exact(offload=False), groups=slice(i - span, i + 1), history=False)
    share = groups[i].frame_count / groups[-1].frames.stop
    loss = share * loss_fn(decoded[:, :, -groups[i].frame_count :], target[:, :, frames].to(decoded))
    (gradient,) = torch.autograd.grad(loss, leaf)
    return group_norms(gradient, near)[::-1]


def group_norms(gradient: Tensor, groups: list[FrameGroup]) -> list[float]:
    """Frobenius norm of the gradient at the latents of each frame group."""
    return torch.stack([gradient[:, :, g.latents].float().norm() for g in groups]).tolist()
