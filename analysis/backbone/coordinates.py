"""Which coordinates of a large gradient are kept.

The measures of ``analysis.backbone.mean_gradient`` are sums over coordinates, or ratios of such sums: mean absolute
error, squared norms and inner products; Adam's update treats every coordinate alone. So a sample in which every
coordinate has the same chance estimates all of them, for a model whose whole gradients could not be kept for every
clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coordinates:
    """Places in a model's tensors.

    Attributes:
        places: indices into each flattened tensor, ascending, on the CPU; None: all of it.
        sizes: how many are kept of each tensor.
        total: how many there are in all.
    """

    places: list[Tensor | None]
    sizes: list[int]
    total: int

    def __len__(self) -> int:
        return sum(self.sizes)

    def values(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """[kept], float32, on the CPU: the gradients of the tensors at these places; zero where there is none."""
        kept = []
        for tensor, gradient, places in zip(tensors, gradients, self.places, strict=True):
            flat = (torch.zeros_like(tensor) if gradient is None else gradient).flatten()
            kept.append((flat if places is None else flat[places.to(flat.device)]).float().cpu())
        return torch.cat(kept)


def sampled_coordinates(tensors: Sequence[Tensor], count: int | None = None, seed: int = 0) -> Coordinates:
    """``count`` coordinates, each with the same chance of being among them; all for None, or where there are fewer.

    One is drawn from each of ``count`` equal stretches of the concatenated tensors, so every tensor has its share.

    Raises:
        ValueError: less than one coordinate.
    """
    numel = [t.numel() for t in tensors]
    total = sum(numel)
    if count is not None and count < 1:
        raise ValueError(f"At least one coordinate must be kept, got {count}.")
    if count is None or count >= total:
        return Coordinates([None] * len(numel), numel, total)
    generator = torch.Generator().manual_seed(seed)
    # Where a stretch is not a whole number of coordinates, two neighbours may meet at its border: one of them is lost.
    drawn = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * (total / count)
    drawn = drawn.long().clamp(max=total - 1).unique()
    starts = torch.tensor([0, *numel]).cumsum(0)
    borders = torch.searchsorted(drawn, starts).tolist()
    places = [drawn[a:b] - start for a, b, start in zip(borders, borders[1:], starts.tolist())]
    return Coordinates(list(places), [len(p) for p in places], total)
