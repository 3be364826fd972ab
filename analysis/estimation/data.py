"""Clips, backbone and pairwise gradients that the comparison of estimators shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.backbone.restoration import Restoration
from analysis.backbone.samples import Samples
from analysis.backbone.task_settings import TaskSettings
from suite.bootstrap import mean_interval
from suite.progress import track


class Data:
    """What the cases share, computed when the first of them needs it.

    Args:
        count, seed: of the clips.
    """

    def __init__(self, settings: TaskSettings, count: int, seed: int) -> None:
        self.task, self.count, self.seed = Restoration(settings), count, seed
        self.fingerprint = self.task.fingerprint()
        self.groups = len(self.task.groups)

    @cached_property
    def samples(self) -> Samples:
        return self.task.samples(self.count, seed=4_000 + self.seed, films=[])

    @cached_property
    def backbone(self) -> nn.Module:
        return self.task.warmed_up(self.fingerprint)

    @cached_property
    def pairs(self) -> Tensor:
        """[clips, i, j, ...]: every pairwise gradient at the decoder's input, on the CPU."""
        n = self.task.clips_at_once
        starts = track(range(0, len(self.samples), n), description="pairwise gradients")
        parts = (self.samples[k : k + n] for k in starts)
        return torch.cat([self.task.latent_pairs(self.backbone, part, F.mse_loss).cpu() for part in parts])

    def of_parameters(self, terms: Callable[[Tensor], Tensor]) -> Tensor:
        """[clips, k, parameters]: the backbone's gradient from each of the terms [k, j, ...] of a clip's pairs."""
        clips = track(self.pairs, description="backbone", total=len(self.pairs))
        rows = [
            self.task.parameter_gradients(self.backbone, self.samples.condition[k : k + 1], terms(pairs))
            for k, pairs in enumerate(clips)
        ]
        return torch.stack(rows)

    def interval(self, values: Sequence[float]) -> list[float]:
        return list(mean_interval(values, self.samples.sources))


def relative_error(got: Tensor, full: Tensor) -> float:
    return ((got - full).norm() / full.norm()).item()
