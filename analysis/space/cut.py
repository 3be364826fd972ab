"""The gradient truncated in space by its definition, and what independent tiles make of frames and gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import chopgrad
from chopgrad import CausalDecoder, Full


class _Window:
    """Rows of the latents inside which the adjoint is kept; changed between two backward passes of one graph."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.first, self.last = 0, rows


class _Keep(torch.autograd.Function):
    """The same tensor; its adjoint is zero outside of the window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        ctx.window = window
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *adjoints: Any) -> tuple[Tensor, None]:
        (adjoint,), window = adjoints, ctx.window
        if window.first <= 0 and window.last >= window.rows:
            return adjoint, None
        scale = adjoint.shape[-2] // window.rows
        kept = torch.zeros_like(adjoint)
        inside = slice(max(0, window.first) * scale, window.last * scale)
        kept[..., inside, :] = adjoint[..., inside, :]
        return kept, None


def bounds(rows: int, strips: int) -> list[tuple[int, int]]:
    """First and last (not included) latent row of each strip."""
    return list(pairwise(rows * j // strips for j in range(strips + 1)))


class CutDecode:
    """One decode with its whole graph, whose adjoint can be cut in space wherever a piece hands something on.

    Attributes:
        frames: [batch, 3, frames, H, W].
    """

    def __init__(self, decoder: CausalDecoder, latents: Tensor) -> None:
        self._window = _Window(latents.shape[-2])
        self._latents = latents.detach().clone().requires_grad_()
        state: Any = decoder.initial_state()
        found: list[Tensor] = []
        for group in decoder.frame_groups(latents.shape[2]):
            features: tuple[Tensor, ...] = (self._keep(self._latents[:, :, group.latents]),)
            after: list[Any] = []
            for piece, before in zip(decoder.pieces(), state, strict=True):
                made, new = piece(features, tree_map_only(Tensor, self._keep, before))
                features = tuple(map(self._keep, made))
                after.append(new)
            state = tuple(after)
            found.append(features[0])
        self.frames = torch.cat(found, dim=2)

    def gradient(self, adjoint: Tensor, strips: int = 1, space: int | None = None) -> Tensor:
        """Of ``(frames * adjoint).sum()`` at the latents: strip by strip, each cut ``space`` latent rows beyond it.

        Args:
            space: None: nothing is cut.

        Cost: as many backward passes as strips.
        """
        rows, total = self._window.rows, torch.zeros_like(self._latents)
        scale = self.frames.shape[-2] // rows
        for top, bottom in bounds(rows, strips):
            if space is not None:
                self._window.first, self._window.last = top - space, bottom + space
            seed = torch.zeros_like(adjoint)
            seed[..., top * scale : bottom * scale, :] = adjoint[..., top * scale : bottom * scale, :]
            total += torch.autograd.grad(self.frames, self._latents, seed, retain_graph=True)[0]
        self._window.first, self._window.last = 0, rows
        return total

    def _keep(self, x: Tensor) -> Tensor:
        return _Keep.apply(x, self._window)  # type: ignore[no-untyped-call]


class TiledDecode:
    """Strips of the latents decoded on their own, with so many rows beside them that are cut off the frames.

    What it loses is what the pieces would have read beyond: this is another model than the decoder.
    """

    def __init__(self, decoder: CausalDecoder, latents: Tensor, strips: int, space: int) -> None:
        self._latents = latents.detach().clone().requires_grad_()
        rows, found = latents.shape[-2], []
        for top, bottom in bounds(rows, strips):
            first, last = max(0, top - space), min(rows, bottom + space)
            x = chopgrad.decode(decoder, self._latents[..., first:last, :], Full())
            scale = x.shape[-2] // (last - first)
            found.append(x[..., (top - first) * scale : (bottom - first) * scale, :])
        self.frames = torch.cat(found, dim=-2)

    def gradient(self, adjoint: Tensor) -> Tensor:
        """Of ``(frames * adjoint).sum()`` at the latents."""
        return torch.autograd.grad(self.frames, self._latents, adjoint, retain_graph=True)[0]


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative error (Frobenius norm over all latents) and cosine of a gradient against the exact one."""
    a, b = found.flatten().double(), exact.flatten().double()
    return {
        "relative_error": ((a - b).norm() / b.norm()).item(),
        "cosine": (a @ b / (a.norm() * b.norm())).clamp(-1, 1).item(),
    }


def share_at_cuts(found: Tensor, exact: Tensor, strips: int, beside: int = 1) -> float:
    """Of the squared error, what lies in the latent rows at most ``beside`` away from a border between strips."""
    rows = exact.shape[-2]
    by_row = (found - exact).double().square().sum((0, 1, 2, 4))
    near = torch.zeros(rows, dtype=torch.bool)
    for top, _ in bounds(rows, strips)[1:]:
        near[max(0, top - beside) : top + beside] = True
    return (by_row[near].sum() / by_row.sum()).item() if by_row.sum() > 0 else 0.0
