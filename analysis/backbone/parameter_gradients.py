"""The gradient of a pixel loss by a backbone's parameters, of every clip and under every truncation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from analysis.backbone.mean_gradient import Gradients
from analysis.backbone.restoration import Restoration
from analysis.backbone.samples import Samples
from suite.pairwise import truncated
from suite.progress import track


def truncations(groups: int, blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(block, distance) of every truncation that differs from full back-propagation, which comes last."""
    kinds = [(w, d) for w in blocks for d in range(groups) if w + d - 1 < groups - 1]
    return [*kinds, (1, groups - 1)]


def gradients(
    task: Restoration, backbone: nn.Module, samples: Samples, loss_fn: Callable[..., Tensor], blocks: tuple[int, ...]
) -> Gradients:
    """Every clip's parameter gradient under every truncation that differs from full back-propagation.

    Cost: a decode and T backward passes of the decoder per clip, and T VJPs of the backbone per clip and block; the
    host keeps 4 bytes x clips x truncations x kept coordinates.
    """
    kinds, kept = truncations(len(task.groups), blocks), task.coordinates(backbone)
    found = torch.empty(len(kinds), len(samples), len(kept))
    starts = range(0, len(samples), task.clips_at_once)
    for start in track(starts, description="backbone gradients"):
        part = samples[start : start + task.clips_at_once]
        for k, pairs in enumerate(task.latent_pairs(backbone, part, loss_fn)):
            masked = torch.stack([truncated(pairs, d, w) for w, d in kinds])
            found[:, start + k] = task.parameter_gradients(backbone, part.condition[k : k + 1], masked, kept)
    return Gradients(dict(zip(kinds[:-1], found[:-1])), found[-1], kept.sizes, samples.sources)
