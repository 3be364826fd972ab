"""Estimators of the influence ||J_ij|| of latent z_j on the frames x_i, J_ij = dx_i/dz_j (arXiv 2603.17812, Sec. 3.2).

The Jacobian of one pair has some 10^8 entries even for the small embedded decoders, so it is only ever applied:
J^T u by back-propagation, J v by back-propagation through that (J^T u is linear in u, so its own vector-Jacobian
product is J v). Two norms follow:

- Frobenius, by Hutchinson's estimator: E ||J_ij^T u||^2 = ||J_ij||_F^2 for random signs u. Unbiased, with a standard
  error, and one backward pass per probe serves all latents j at once.
- operator (the largest singular value), by Lanczos iteration on J^T J: power iteration that keeps its Krylov space.
  It needs a few pairs of products for each (i, j).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, svds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chopgrad import CausalDecoder

DENSE = 16  # below this many latent or frame entries the whole Jacobian is cheaper than an iteration


def decode_with_leaves(
    decoder: CausalDecoder, latents: Tensor, last: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(the latents of each group as leaves, the frames of each group), in one graph, up to group ``last``."""
    groups = decoder.frame_groups(latents.shape[2])[: None if last is None else last + 1]
    zs = [latents[:, :, g.latents].detach().clone().requires_grad_() for g in groups]
    frames, state = [], decoder.initial_state()
    with twice_differentiable():
        for z in zs:
            x, state = decoder.step(z, state)
            frames.append(x)
    return zs, frames


def twice_differentiable() -> AbstractContextManager[None]:
    """Attention in its plain form: the fused ones cannot be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def frobenius_samples(
    decoder: CausalDecoder, latents: Tensor, outputs: Sequence[int], probes: int, seed: int = 0
) -> np.ndarray:
    """[outputs, T, probes]: values ||J_ij^T u||^2 whose mean over the probes estimates ||J_ij||_F^2; zero for j > i.

    Args:
        latents: [1, channels, latent_frames, h, w].
        outputs: the groups i.
        probes: vectors u of random signs for each i.

    Cost: one decode with its graph in memory, and ``probes`` backward passes for each output.

    Raises:
        ValueError: a batch of more than one, no probe, or an output that the video does not have.
    """
    count = _check(decoder, latents, outputs)
    if probes < 1:
        raise ValueError(f"At least one probe is needed, got {probes}.")
    generator = torch.Generator().manual_seed(seed)
    zs, frames = decode_with_leaves(decoder, latents, max(outputs))
    samples = np.zeros((len(outputs), count, probes))
    for row, i in enumerate(outputs):
        for probe in range(probes):
            signs = torch.randint(0, 2, frames[i].shape, generator=generator).to(frames[i]) * 2 - 1
            for j, gradient in enumerate(_transposed(frames[i], zs[: i + 1], signs)):
                samples[row, j, probe] = gradient.double().square().sum().item()
    return samples


def frobenius_norm(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(norm, its standard error) from ``frobenius_samples``, over the last axis; NaN as error of a single probe."""
    probes = samples.shape[-1]
    norm = np.sqrt(samples.mean(-1))
    if probes == 1:
        return norm, np.full_like(norm, np.nan)
    spread = samples.std(-1, ddof=1) / np.sqrt(probes)
    # The delta method: d sqrt(s) = ds / (2 sqrt(s)).
    return norm, np.divide(spread, 2 * norm, out=np.zeros_like(norm), where=norm > 0)


def operator_norms(
    decoder: CausalDecoder, latents: Tensor, pairs: Sequence[tuple[int, int]], tolerance: float = 0.1, seed: int = 0
) -> dict[tuple[int, int], float]:
    """||J_ij||_2 for pairs (i, j) with j <= i.

    The square of ``tolerance`` bounds the relative residual of the eigenvalue ||J_ij||^2. A Krylov method approaches
    from below, and its error is of the order of the residual's square, so 0.1 gives the norm to some parts in a
    thousand (the tests compare with whole Jacobians). Small Jacobians are computed whole.

    Cost: for each pair some five to ten products with J and J^T, each through i - j + 1 groups.

    Raises:
        ValueError: a batch of more than one, or a pair that the video does not have.
        RuntimeError: the iteration did not converge.
    """
    count = _check(decoder, latents, [i for i, _ in pairs])
    if any(not 0 <= j <= i < count for i, j in pairs):
        raise ValueError(f"Pairs must be (i, j) with 0 <= j <= i < {count}, got {list(pairs)}.")
    groups = decoder.frame_groups(latents.shape[2])
    result = {}
    entering = decoder.initial_state()
    for j in range(max((j for _, j in pairs), default=-1) + 1):
        z = latents[:, :, groups[j].latents].detach().clone().requires_grad_()
        wanted = sorted(i for i, k in pairs if k == j)
        state, start = entering, None
        with twice_differentiable():
            for i in range(j, max(wanted, default=-1) + 1):
                x, state = decoder.step(z if i == j else latents[:, :, groups[i].latents].detach(), state)
                if i in wanted:
                    result[i, j], start = _largest_singular_value(x, z, tolerance, start, seed)
        with torch.no_grad():
            _, entering = decoder.step(z, entering)
    return result


def _largest_singular_value(
    x: Tensor, z: Tensor, tolerance: float, start: np.ndarray | None, seed: int
) -> tuple[float, np.ndarray | None]:
    """(largest singular value of dx/dz, its right vector); the vector of the distance before is a good start."""
    if min(x.numel(), z.numel()) <= DENSE:
        return torch.linalg.matrix_norm(dense_jacobian(x, z), 2).item(), None
    dual = torch.zeros_like(x, requires_grad=True)
    (pulled,) = _transposed(x, [z], dual, create_graph=True)
    rng = np.random.default_rng(seed)
    if not pulled.requires_grad or not _transposed(x, [z], torch.ones_like(x))[0].any():
        return 0.0, start
    kind = np.float64 if x.dtype == torch.float64 else np.float32

    def forward(v: np.ndarray) -> np.ndarray:
        tangent = torch.from_numpy(v.astype(kind)).view_as(z).to(z)
        return torch.autograd.grad(pulled, dual, tangent, retain_graph=True)[0].flatten().cpu().numpy()

    def backward(u: np.ndarray) -> np.ndarray:
        adjoint = torch.from_numpy(u.astype(kind)).view_as(x).to(x)
        return _transposed(x, [z], adjoint)[0].flatten().cpu().numpy()

    # Some of a random direction always stays in the start, or a direction that it lacks could never be found.
    random = rng.standard_normal(z.numel())
    random /= np.linalg.norm(random)
    begin = random if start is None else start + 0.3 * random
    operator = LinearOperator((x.numel(), z.numel()), matvec=forward, rmatvec=backward, dtype=kind)
    tall = x.numel() >= z.numel()  # svds starts on the smaller side
    try:
        _, s, vt = svds(operator, k=1, ncv=5, tol=tolerance, v0=begin.astype(kind) if tall else forward(begin), rng=rng)
    except ArpackNoConvergence as error:
        raise RuntimeError(f"The operator norm did not converge to a tolerance of {tolerance}: raise it.") from error
    return float(s[0]), vt[0].astype(np.float64)


def dense_jacobian(x: Tensor, z: Tensor) -> Tensor:
    """dx/dz as a matrix, row by row (or, where z is smaller, column by column); for few entries."""
    if x.numel() <= z.numel():
        if not x.requires_grad:
            return x.new_zeros(x.numel(), z.numel())
        basis = torch.eye(x.numel()).to(x).view(-1, *x.shape)
        (rows,) = torch.autograd.grad(x, z, basis, retain_graph=True, is_grads_batched=True, materialize_grads=True)
        return rows.flatten(1)
    dual = torch.zeros_like(x, requires_grad=True)
    (pulled,) = _transposed(x, [z], dual, create_graph=True)
    if not pulled.requires_grad:
        return x.new_zeros(x.numel(), z.numel())
    basis = torch.eye(z.numel()).to(z).view(-1, *z.shape)
    return torch.autograd.grad(pulled, dual, basis, retain_graph=True, is_grads_batched=True)[0].flatten(1).T


def _transposed(x: Tensor, zs: Sequence[Tensor], u: Tensor, create_graph: bool = False) -> list[Tensor]:
    """J^T u for each z; zeros where x does not depend on it."""
    if not x.requires_grad:
        return [torch.zeros_like(z) for z in zs]
    gradients = torch.autograd.grad(x, zs, u, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(z) if g is None else g for z, g in zip(zs, gradients, strict=True)]


def _check(decoder: CausalDecoder, latents: Tensor, outputs: Sequence[int]) -> int:
    if latents.ndim != 5 or latents.shape[0] != 1:
        raise ValueError(
            f"Influences are of one video: pass latents [1, channels, T, h, w], got {list(latents.shape)}."
        )
    count = len(decoder.frame_groups(latents.shape[2]))
    if not outputs or not all(0 <= i < count for i in outputs):
        raise ValueError(f"Pass output groups from 0 to {count - 1}, got {list(outputs)}.")
    return count
