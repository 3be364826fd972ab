"""Scores of restored clips that no training has seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.tasks.data.pairs import Pairs, from_bytes
from bench.tasks.training.train import UNSEEN, Training
from suite.metrics import FVD, METRICS, score_sets, score_videos, unavailable, video_features

FIRST_TEST_CLIP = UNSEEN + 1000  # those before are shown during training
BATCH = 4


def test_clips(training: Training, count: int) -> Pairs:
    """The test clips of a task: the same for every arm and seed."""
    return training.clips(range(FIRST_TEST_CLIP, FIRST_TEST_CLIP + count))


def restored_clips(training: Training, clips: Pairs) -> Tensor:
    """The model's answers as 8-bit video would show them: uint8 [clips, 3, frames, H, W]."""
    parts = []
    for k in range(0, len(clips), BATCH):
        batch = clips.batch(range(k, min(k + BATCH, len(clips))))
        parts.append(as_bytes(training.restore(batch["condition_latents"])))
    return torch.cat(parts)


@torch.no_grad()
def autoencoded_clips(training: Training, clips: Pairs) -> Tensor:
    """The targets through encoder and decoder alone: what a perfect loss in latent space would give."""
    like = next(iter(training.decoder.parameters()))
    videos = []
    for k in range(len(clips)):
        latents = training.decoder.denormalize(clips[k]["latents"][None].to(like.device)).to(like.dtype)
        videos.append(as_bytes(training.decoder.decode(latents).float()))
    return torch.cat(videos)


def as_bytes(video: Tensor) -> Tensor:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def scores(restored: Tensor, target: Tensor, device: torch.device, with_fvd: bool = True) -> dict[str, Any]:
    """Each metric of each clip, and the FVD of all of them (which costs as much as all else on a CPU).

    Args:
        restored, target: uint8 [clips, 3, frames, H, W].

    Returns:
        ``per_clip``: metric -> one number a clip (None where a weight file is missing); ``fvd`` with its split-half
        noise; ``missing``: what could not be computed, and how to get it.
    """
    per_clip: dict[str, list[float | None] | None] = {name: [] for name in METRICS}
    for x, y in zip(restored, target, strict=True):
        values = score_videos(from_bytes(x)[None].to(device), from_bytes(y)[None].to(device))
        for name, found in values.items():
            column = per_clip[name]
            if found is None or column is None:
                per_clip[name] = None
            else:
                column += found
    missing = unavailable()
    fvd: FVD | None = None
    if with_fvd and "fvd" not in missing and len(restored) >= 4:
        fvd = score_sets(_features(restored, device), _target_features(_Same(target), device))["fvd"]
    return {
        "per_clip": per_clip,
        "fvd": None if fvd is None else fvd.value,
        "fvd_split_half_noise": None if fvd is None else fvd.split_half_noise,
        "missing": missing,
    }


def _features(videos: Tensor, device: torch.device) -> Tensor:
    clips: Sequence[Tensor] = [from_bytes(v).to(device) for v in videos]
    return video_features(clips)


class _Same:
    """Targets as a key: all arms and seeds of a task share them."""

    def __init__(self, videos: Tensor) -> None:
        self.videos = videos
        self.key = hash(videos.numpy().tobytes())

    def __hash__(self) -> int:
        return self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and torch.equal(self.videos, other.videos)


@lru_cache(maxsize=8)
def _target_features(targets: _Same, device: torch.device) -> Tensor:
    return _features(targets.videos, device)
