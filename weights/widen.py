"""More latent channels for a trained model, without a change of what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(trained: dict[str, Tensor], untrained: dict[str, Tensor], channels: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of a wider model that computes what the trained one does.

    ``channels`` are the latent channels of the two. What the wider model adds keeps its random start, but nothing new
    flows into what was there: new inputs of trained outputs are zero. So the decoder ignores the new latents at first;
    training makes use of them.

    Raises:
        ValueError: fewer channels than before, or models that differ in more than their latents.
    """
    old, new = channels
    if new < old:
        raise ValueError(f"A model of {old} latent channels can be given more of them, not {new}.")

    def places(before: int, after: int) -> Tensor:
        if (before, after) == (2 * old, 2 * new):  # mean and log variance
            return torch.cat([torch.arange(old), new + torch.arange(old)])
        if before == after or (before, after) == (old, new):
            return torch.arange(before)
        raise ValueError(f"The trained and the wider model differ in more than their latents ({before} and {after}).")

    result = {}
    for name, value in trained.items():
        wide = untrained[name].clone()
        rows = places(value.shape[0], wide.shape[0])
        wide[rows] = 0
        if value.ndim == 1:
            wide[rows] = value.to(wide)
        else:
            wide[rows[:, None], places(value.shape[1], wide.shape[1])] = value.to(wide)
        result[name] = wide
    return result
