"""Recurrences with exact answers: what every estimator and every bound is checked on before it sees a decoder.

Each toy is a ``CausalDecoder`` with one latent and one frame a group, both plain vectors ([batch, channels, 1, 1, 1]),
so the library's ``frame_loss`` and every estimator of ``analysis/`` run on it unchanged. ``jacobian`` gives
J_ij = dx_i/dz_j (arXiv 2603.17812, Sec. 3.2) in closed form, without automatic differentiation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from chopgrad.decoders.base import CausalDecoder, FrameGroup, State, check_latent_frames

DTYPE = torch.float64


class Toy(CausalDecoder):
    """A recurrence on vectors. Cost of everything here: microseconds per group."""

    def __init__(self, **matrices: Tensor) -> None:
        parameters = {k: nn.Parameter(v.to(DTYPE), requires_grad=False) for k, v in matrices.items()}
        super().__init__(nn.ParameterDict(parameters))

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        return [FrameGroup(slice(i, i + 1), slice(i, i + 1)) for i in range(latent_frames)]

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.vae.parameters()

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents

    def normalize(self, latents: Tensor) -> Tensor:
        return latents

    @abstractmethod
    def jacobian(self, latents: Tensor, i: int, j: int) -> Tensor:
        """J_ij [channels of x, channels of z] at these latents [1, channels, T, 1, 1], zero for j > i."""

    def random_latents(self, count: int, seed: int = 0) -> Tensor:
        """Normally distributed latents [1, channels, count, 1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, self.latent_channels, count, 1, 1, generator=generator, dtype=DTYPE)


class LinearRecurrence(Toy):
    """s_i = A s_{i-1} + B z_i and x_i = C s_i, so that J_ij = C A^{i-j} B."""

    def __init__(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> None:
        identity = torch.eye(len(a), dtype=DTYPE)
        super().__init__(a=a, b=identity if b is None else b, c=identity if c is None else c)

    @property
    def latent_channels(self) -> int:
        return self.vae["b"].shape[1]

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        s = z.flatten(1) @ self.vae["b"].T
        if state is not None:
            s = s + state @ self.vae["a"].T
        return (s @ self.vae["c"].T)[:, :, None, None, None], s

    def jacobian(self, latents: Tensor, i: int, j: int) -> Tensor:
        a, b, c = (self.vae[k] for k in "abc")
        return c @ torch.linalg.matrix_power(a, i - j) @ b if i >= j else torch.zeros_like(c @ b)


class Contraction(Toy):
    """s_i = rho tanh(W s_{i-1} + z_i) with an orthogonal W, and x_i = s_i.

    Each step contracts by rho at least, whatever the latents: ||J_ij|| <= rho^{i-j+1}. J_ij is the product of the
    steps' Jacobians rho diag(1 - tanh^2) W.
    """

    def __init__(self, w: Tensor, rho: float) -> None:
        super().__init__(w=w)
        self.rho = rho

    @property
    def latent_channels(self) -> int:
        return len(self.vae["w"])

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        s = self.rho * torch.tanh(z.flatten(1) + (0 if state is None else state @ self.vae["w"].T))
        return s[:, :, None, None, None], s

    def jacobian(self, latents: Tensor, i: int, j: int) -> Tensor:
        w = self.vae["w"]
        if j > i:
            return torch.zeros_like(w)
        s, result = torch.zeros(len(w), dtype=DTYPE), torch.eye(len(w), dtype=DTYPE)
        for k in range(i + 1):
            t = torch.tanh(latents[0, :, k, 0, 0] + w @ s)
            s, slope = self.rho * t, self.rho * torch.diag(1 - t.square())
            result = slope if k == j else slope @ w @ result if k > j else result
        return result


class FiniteMemory(Toy):
    """A stack of causal convolutions over time, one scalar kernel each: what the decoders are, without their rest.

    With L layers of K taps the influence is exactly zero beyond distance R = L (K - 1); before, J_ij is the identity
    times coefficient i - j of the product of the kernels as polynomials.
    """

    def __init__(self, channels: int, kernels: Tensor) -> None:
        super().__init__(kernels=kernels)
        self.channels = channels

    @property
    def latent_channels(self) -> int:
        return self.channels

    @property
    def receptive_field(self) -> int:
        layers, taps = self.vae["kernels"].shape
        return layers * (taps - 1)

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        layers, taps = self.vae["kernels"].shape
        x = z.flatten(1)
        state = state or [x.new_zeros(taps - 1, *x.shape)] * layers
        after = []
        for kernel, cache in zip(self.vae["kernels"], state, strict=True):
            seen = torch.cat([x[None], cache])  # newest first
            after.append(seen[:-1])
            x = torch.einsum("k,k...->...", kernel, seen)
        return x[:, :, None, None, None], after

    def jacobian(self, latents: Tensor, i: int, j: int) -> Tensor:
        product = np.ones(1)
        for kernel in self.vae["kernels"].numpy():
            product = np.convolve(product, kernel)
        coefficient = product[i - j] if 0 <= i - j < len(product) else 0.0
        return torch.eye(self.channels, dtype=DTYPE) * coefficient


@dataclass(frozen=True)
class Case:
    """A toy and what is known about it.

    Args:
        alpha: decay rate of the operator norm per group where that is exactly exponential, else None.
        receptive_field: the largest distance with an influence, None where there is none.
        local: whether the premise of the theorem holds: an exponential bound that does not depend on the video.
    """

    build: Callable[[], Toy]
    alpha: float | None
    receptive_field: int | None
    local: bool


def _orthogonal(dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DTYPE)).Q


def scalar(rho: float) -> LinearRecurrence:
    """||J_ij|| = rho^{i-j}."""
    return LinearRecurrence(torch.tensor([[rho]], dtype=DTYPE))


def normal(dim: int, rho: float, seed: int = 0) -> LinearRecurrence:
    """Symmetric A of spectral radius rho between two rotations: ||J_ij|| = rho^{i-j} in the operator norm."""
    q = _orthogonal(dim, seed)
    eigenvalues = torch.linspace(0.2, 1.0, dim, dtype=DTYPE) * rho
    return LinearRecurrence(q @ torch.diag(eigenvalues) @ q.T, _orthogonal(dim, seed + 1), _orthogonal(dim, seed + 2))


def sheared(dim: int, rho: float) -> LinearRecurrence:
    """Spectral radius rho, but not normal: influence grows before it decays, so C must exceed the influence at 0."""
    return LinearRecurrence(rho * (torch.eye(dim, dtype=DTYPE) + torch.diag(torch.ones(dim - 1, dtype=DTYPE), 1)))


def contraction(dim: int, rho: float, seed: int = 0) -> Contraction:
    return Contraction(_orthogonal(dim, seed), rho)


def finite_memory(channels: int, layers: int, taps: int) -> FiniteMemory:
    """Positive kernels of sum one: a smoothing that has forgotten everything beyond its receptive field."""
    kernel = torch.arange(taps, 0, -1, dtype=DTYPE)
    return FiniteMemory(channels, (kernel / kernel.sum()).expand(layers, taps).clone())


def rotating(dim: int, seed: int = 0) -> LinearRecurrence:
    """Orthogonal A: ||J_ij|| = 1 at every distance. Nothing is ever forgotten."""
    return LinearRecurrence(_orthogonal(dim, seed))


def accumulating(dim: int) -> LinearRecurrence:
    """x_i = z_0 + ... + z_i: the gradient of z_j is the sum over all later losses, and truncation loses most of it."""
    return LinearRecurrence(torch.eye(dim, dtype=DTYPE))


TOYS: dict[str, Case] = {
    "scalar 0.5": Case(lambda: scalar(0.5), -float(np.log(0.5)), None, True),
    "scalar 0.9": Case(lambda: scalar(0.9), -float(np.log(0.9)), None, True),
    "normal 0.7": Case(lambda: normal(24, 0.7), -float(np.log(0.7)), None, True),
    "sheared 0.6": Case(lambda: sheared(4, 0.6), None, None, True),
    "contraction 0.8": Case(lambda: contraction(24, 0.8), None, None, True),
    "finite memory": Case(lambda: finite_memory(3, 4, 3), None, 8, True),
    "rotating": Case(lambda: rotating(24), 0.0, None, False),
    "accumulating": Case(lambda: accumulating(3), 0.0, None, False),
}
