"""Frechet video distance FVD (Unterthiner et al. 2018), 0 for equal sets, lower is better.

    FVD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

between the Gaussians fitted to the I3D logits of two sets of clips (mean m, covariance S). It asks whether the two
sets look alike as sets, not whether a clip equals its target. The Frechet distance is torch-fidelity's.

With few clips it is mostly the noise of S, and biased upwards: 400 logits need far more clips than a small experiment
has. So every value carries its own split-half noise, the mean FVD between two random halves of the targets. Halves
have half the clips and so more noise than the value has; still, what is small beside it means nothing, unless methods
are compared with each other on the same clips (paired).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import Dataset

from suite.metrics.frames import check_finite, check_target_range
from suite.networks.i3d import CLASSES, MIN_FRAMES, i3d
from suite.progress import track

SPLITS = 8
MIN_TARGETS = 4  # two in each half
EXTRACTOR, LAYER = "given-video-features", "logits"


@dataclass(frozen=True)
class FVD:
    """A distance and the noise to read it against."""

    value: float
    split_half_noise: float
    restored_clips: int
    target_clips: int

    def __str__(self) -> str:
        return (
            f"FVD {self.value:.4g} ({self.restored_clips} clips against {self.target_clips}; two halves of the "
            f"targets are {self.split_half_noise:.4g} apart: only paired comparisons mean anything below that)"
        )


def fvd(restored: Sequence[Tensor] | Tensor, target: Sequence[Tensor] | Tensor) -> FVD:
    """FVD between two sets of clips.

    Args:
        restored, target: clips [3, frames, H, W] in [-1, 1] (or a batch of them), at least 9 frames each; or features
            [clips, 400] from ``video_features``, so that targets shared by several methods run only once.

    Raises:
        FileNotFoundError: the I3D weights are not installed.
        ValueError: fewer than 2 restored clips or 4 target clips, or clips of fewer than 9 frames.
    """
    if len(restored) < 2 or len(target) < MIN_TARGETS:
        raise ValueError(
            f"FVD needs at least 2 restored clips and {MIN_TARGETS} target clips (2 in each half of the split that "
            f"shows its noise), got {len(restored)} and {len(target)}."
        )
    for name, clips in (("restored", restored), ("target", target)):
        for clip in clips if not _are_features(clips) else ():
            _check_clip(name, clip)
    ours, theirs = (c if _are_features(c) else video_features(c) for c in (restored, target))
    return FVD(frechet_distance(ours, theirs), split_half_noise(theirs), len(ours), len(theirs))


def video_features(clips: Sequence[Tensor] | Tensor) -> Tensor:
    """I3D logits [clips, 400] in float64 of clips [3, frames, H, W] in [-1, 1].

    Cost: see ``suite.networks.i3d``; progress goes to stderr.
    """
    network = i3d(clips[0].device)
    rows = []
    with torch.no_grad():
        for clip in track(clips, "I3D", transient=True):
            rows.append(network(clip[None].float().clamp(-1, 1)).double().cpu())
    return torch.cat(rows)


def split_half_noise(features: Tensor, splits: int = SPLITS, seed: int = 0) -> float:
    """Mean Frechet distance between two random halves of the rows of ``features`` [clips, n]."""
    generator = torch.Generator().manual_seed(seed)
    half = len(features) // 2
    distances = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        distances.append(frechet_distance(features[order[:half]], features[order[half:]]))
    return sum(distances) / splits


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to the rows of [n, d] and [m, d].

    Cost: one eigenvalue problem of size d, 0.1 s for 400 logits.
    """
    torch_fidelity = _torch_fidelity()
    return torch_fidelity.calculate_metrics(
        input1=_Rows(first),
        input2=_Rows(second),
        feature_extractor=EXTRACTOR,
        feature_layer_fid=LAYER,
        fid=True,
        cuda=False,
        save_cpu_ram=True,  # no worker processes
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]


class _Rows(Dataset):
    """Features as torch-fidelity wants its samples: bare tensors."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.double()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


@lru_cache
def _torch_fidelity() -> Any:
    """torch-fidelity with an extractor that hands features through.

    I3D runs outside, once per clip, because its logits serve the value, every split-half and every other method.
    """
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Given(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return (LAYER,)

        def forward(self, rows: Tensor) -> tuple[Tensor]:
            return (rows,)

    torch_fidelity.register_feature_extractor(EXTRACTOR, Given)
    return torch_fidelity


def _are_features(clips: Sequence[Tensor] | Tensor) -> TypeGuard[Tensor]:
    return isinstance(clips, Tensor) and clips.ndim == 2 and clips.shape[1] == CLASSES


def _check_clip(name: str, clip: Tensor) -> None:
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < MIN_FRAMES:
        raise ValueError(
            f"FVD takes clips [3, frames, H, W] of at least {MIN_FRAMES} frames, got a {name} clip {list(clip.shape)}."
        )
    check_finite(name, clip)
    if name == "target":
        check_target_range(clip)
