"""Descent along a truncated gradient where everything is known: least squares through a linear recurrence.

The decoder is c_i = A c_{i-1} + B z_i, x_i = C c_i with A = decay times a rotation, so influence decays as decay^(i-j).
The backbone is z = Phi_k theta for clip k, the loss is f(theta) = 1/2 mean_k
|M Phi_k theta - y_k|^2 with M[i, j] = C A^(i-j) B. Truncation at D replaces M^T by M_D^T, which keeps i - j <= D, so

    g_D(theta) = H_D (theta - theta*) + b,    H_D = mean X_D^T X,   b = mean X_D^T r,   X = M Phi, X_D = M_D Phi,

with r the residual at the optimum theta*. The bias is (H_D H^-1 - I) grad f + b, that is, the bound
|bias|^2 <= m |grad f|^2 + zeta^2 of Ajalloeian and Stich (2020, Assumption 4) holds for every s > 0 with
m = (1 + s) q^2, zeta^2 = (1 + 1/s) |b|^2, q = ||H_D H^-1 - I||.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS, STATE, LATENT, PIXELS, PARAMETERS, CLIPS = 12, 4, 3, 4, 20, 16


@dataclass(frozen=True)
class LinearTask:
    """A batch of seeded problems in float64.

    Attributes:
        inputs: X, [seeds, clips, pixels, parameters].
        latents: Phi, [seeds, clips, latents, parameters].
        decoder: M, [seeds, groups, pixels per group, groups, latents per group].
        target: y, [seeds, clips, pixels].
    """

    inputs: Tensor
    latents: Tensor
    decoder: Tensor
    target: Tensor

    @classmethod
    def draw(cls, seeds: int, decay: float, noise: float) -> LinearTask:
        """Problems of which ``noise`` = 0 can be fitted exactly, and else only up to noise of that standard deviation.

        Raises:
            ValueError: no seed, a decay outside (0, 1), or negative noise.
        """
        if seeds < 1 or not 0 < decay < 1 or noise < 0:
            raise ValueError(
                f"Pass a seed or more, a decay between 0 and 1 and noise of at least 0, got {seeds}, {decay}, {noise}."
            )
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        rotation = torch.linalg.qr(draw(seeds, STATE, STATE))[0]
        into, out = draw(seeds, STATE, LATENT) / STATE**0.5, draw(seeds, PIXELS, STATE) / STATE**0.5
        decoder = torch.zeros(seeds, GROUPS, PIXELS, GROUPS, LATENT, dtype=torch.float64)
        power = torch.eye(STATE, dtype=torch.float64).expand(seeds, -1, -1)
        for d in range(GROUPS):
            for j in range(GROUPS - d):
                decoder[:, j + d, :, j] = out @ power @ into
            power = decay * rotation @ power
        latents = draw(seeds, CLIPS, GROUPS * LATENT, PARAMETERS) / PARAMETERS**0.5
        inputs = decoder.flatten(3).flatten(1, 2)[:, None] @ latents
        truth = draw(seeds, 1, PARAMETERS, 1)
        exact = (inputs @ truth)[..., 0]
        return cls(inputs, latents, decoder, exact + noise * draw(*exact.shape))

    def truncated_inputs(self, distance: int) -> Tensor:
        """X_D."""
        i, j = torch.arange(GROUPS)[:, None], torch.arange(GROUPS)[None, :]
        kept = ((i - j >= 0) & (i - j <= distance)).to(self.decoder)
        matrix = self.decoder * kept[:, None, :, None]
        return matrix.flatten(3).flatten(1, 2)[:, None] @ self.latents


@dataclass(frozen=True)
class Descent:
    """What truncation at one distance does, for each seed.

    Attributes:
        gap: f at the point where the truncated gradient vanishes, minus f(theta*), in closed form.
        start: f(0) - f(theta*).
        relative_bias: q.
        bound: |b|^2 / (2 mu (1 - q)^2), the best over s of zeta^2 / (2 mu (1 - m)); infinite where q >= 1.
        rate: (1 - mu (1 - q^2) / L), the promised factor per step of size 1/L when b = 0; 1 where q >= 1.
        converges: whether steps of size 1/L along g_D settle at all.
        descent, adam: f - f(theta*) along gradient descent and Adam, [steps + 1, seeds].
    """

    gap: Tensor
    start: Tensor
    relative_bias: Tensor
    bound: Tensor
    rate: Tensor
    converges: Tensor
    descent: Tensor
    adam: Tensor


def descend(task: LinearTask, distance: int, steps: int) -> Descent:
    """Both optimisers from theta = 0 along the gradient truncated at ``distance``, against theory.

    The bound follows from f(theta - g/L) <= f - |grad f|^2 / 2L + |bias|^2 / 2L (smoothness L, step 1/L), with
    |grad f|^2 >= 2 mu (f - f*): Ajalloeian and Stich (2020), Theorem 6, without noise.
    """
    mean = lambda a, b: torch.einsum("sknp,sknq->spq", a, b) / CLIPS  # noqa: E731
    x, cut = task.inputs, task.truncated_inputs(distance)
    hessian, truncated = mean(x, x), mean(cut, x)
    optimum = torch.linalg.solve(hessian, mean(x, task.target[..., None]))
    residual = x @ optimum[:, None] - task.target[..., None]
    constant = mean(cut, residual)
    values = torch.linalg.eigvalsh(hessian)
    mu, smoothness = values[:, 0], values[:, -1]

    def excess(error: Tensor) -> Tensor:
        return 0.5 * (error * (hessian @ error)).sum((1, 2))

    identity = torch.eye(PARAMETERS, dtype=torch.float64)
    q = torch.linalg.matrix_norm(truncated @ torch.linalg.inv(hessian) - identity, ord=2)
    bound = constant.square().sum((1, 2)) / (2 * mu * (1 - q) ** 2)
    spectrum = torch.linalg.eigvals(identity - truncated / smoothness[:, None, None]).abs().amax(1)
    curves = []
    for adam in (False, True):
        error = -optimum
        first, second = torch.zeros_like(error), torch.zeros_like(error)
        curve = [excess(error)]
        for t in range(1, steps + 1):
            gradient = truncated @ error + constant
            if adam:
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-12)
                # The step size must vanish, or Adam ends in a ball as wide as its step and not at a point.
                error = error - 0.05 * (1 - (t - 1) / steps) ** 2 * step
            else:
                error = error - gradient / smoothness[:, None, None]
            curve.append(excess(error))
        curves.append(torch.stack(curve))
    return Descent(
        gap=excess(-torch.linalg.solve(truncated, constant)),
        start=curves[0][0],
        relative_bias=q,
        bound=torch.where(q < 1, bound, torch.inf),
        rate=torch.where(q < 1, 1 - mu / smoothness * (1 - q**2), 1.0),
        converges=spectrum < 1,
        descent=curves[0],
        adam=curves[1],
    )
