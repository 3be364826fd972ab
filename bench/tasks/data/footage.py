"""Real footage for the tasks: crops of the videos of a folder, and equal crops of paired videos."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.tasks.task import pick
from suite.clips import VIDEO_SUFFIXES, find_clips, first_frame, none_left, random_crop
from suite.films import index, stretch

T = TypeVar("T")
CONDITION, TARGET = "condition", "target"


def film_clip(
    folder: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> tuple[Tensor, str]:
    """A seeded crop [3, frames, height, width] of a seeded stretch of one of the folder's videos, and its name.

    A video that cannot be read, or is too short, is left out with a warning, and another one drawn.

    Raises:
        ValueError: none can be used.
        OSError: no folder, or no video in it.
    """
    return _of_one(
        {film.name: film for film in find_clips(folder)},
        lambda film: stretch_of(film, generator, frames, height, width, zoom),
        generator,
    )


def stretch_of(
    film: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> Tensor:
    """A seeded crop [3, frames, height, width] of a seeded stretch of one video.

    Raises:
        ValueError: it cannot be read, or is too short.
    """
    start = first_frame(film, frames, generator)
    return random_crop(stretch(film, start, frames), height, width, generator, zoom)


def paired_clip(
    folder: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> tuple[Tensor, Tensor, str]:
    """The same crop of the same stretch of ``folder/condition/NAME`` and ``folder/target/NAME``, and the name.

    A pair that cannot be read, is too short, or whose partners differ in length or size, is left out with a warning,
    and another one drawn.

    Raises:
        ValueError: none can be used.
        OSError: a folder or a partner is missing.
    """

    def both_of(pair: tuple[Path, Path]) -> Tensor:
        lengths = [index(path).length for path in pair]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"'{pair[0].name}' has {lengths[0]} frames in {CONDITION}/ and {lengths[1]} in {TARGET}/: "
                "pass pairs of equal length."
            )
        start = first_frame(pair[0], frames, generator)
        stretches = zip(*(stretch(path, start, frames) for path in pair), strict=True)
        return random_crop(map(_side_by_side, stretches, repeat(pair[0].name)), height, width, generator, zoom)

    both, name = _of_one({pair[0].name: pair for pair in find_pairs(folder)}, both_of, generator)
    return both[:3].clone(), both[3:].clone(), name


def _side_by_side(pictures: tuple[np.ndarray, np.ndarray], name: str) -> np.ndarray:
    """Two of [H, W, 3] -> [H, W, 6], so that one crop is cut of both."""
    sizes = ["{}x{}".format(*picture.shape) for picture in pictures]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"'{name}' has {sizes[0]} pixels in {CONDITION}/ and {sizes[1]} in {TARGET}/: pass pairs of equal size."
        )
    return np.concatenate(pictures, axis=2)


def _of_one(films: Mapping[str, T], cut: Callable[[T], Tensor], generator: torch.Generator) -> tuple[Tensor, str]:
    """(what ``cut`` makes of a film drawn at random, the film's name); where it raises ValueError another is drawn.

    A number of a clip stands for the same clip in every process, so nothing is remembered of films that were left out.
    """
    left, reasons = list(films), []
    while left:
        name = left.pop(pick(generator, len(left)))
        try:
            return cut(films[name]), name
        except ValueError as error:
            reasons.append(str(error))
            if left:
                warnings.warn(f"left out: {error}", stacklevel=2)
    raise none_left(reasons)


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """(condition, target) of every name in the two folders, in order of name.

    Raises:
        OSError: a folder is missing, holds no video, or a video has no partner.
    """
    conditions, targets = (_videos(Path(folder) / side) for side in (CONDITION, TARGET))
    for side, own, other in ((TARGET, conditions, targets), (CONDITION, targets, conditions)):
        missing = sorted(own.keys() - other.keys())
        if missing:
            raise FileNotFoundError(
                f"'{missing[0]}' has no partner in {side}/ ({len(missing)} such): each video of {CONDITION}/ needs one "
                f"of equal name in {TARGET}/, and the other way round."
            )
    return [(path, targets[name]) for name, path in sorted(conditions.items())]


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise NotADirectoryError(
            f"Paired footage lies in two folders, {CONDITION}/ and {TARGET}/, with videos of equal names; "
            f"'{folder.name}/' is missing in '{folder.parent.name}'."
        )
    found = {p.name: p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES}
    if not found:
        raise FileNotFoundError(
            f"No video in '{folder.name}/': looked for files ending in {', '.join(VIDEO_SUFFIXES)}."
        )
    return found
