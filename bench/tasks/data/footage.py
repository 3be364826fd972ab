"""Real footage for the tasks: crops of the videos of a folder, and equal crops of paired videos."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import av
import torch
from torch import Tensor

from bench.tasks.task import pick
from suite.clips import VIDEO_SUFFIXES, find_clips, random_crop, read_frames, to_unit

CONDITION, TARGET = "condition", "target"


def film_clip(
    folder: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> tuple[Tensor, str]:
    """A seeded crop [3, frames, height, width] of a seeded stretch of one of the folder's videos, and its name.

    Raises:
        ValueError: the video drawn cannot be read, or is too short.
        OSError: no folder, or no video in it.
    """
    films = find_clips(folder)
    film = films[pick(generator, len(films))]
    return stretch_of(film, generator, frames, height, width, zoom), film.name


def stretch_of(
    film: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> Tensor:
    """A seeded crop [3, frames, height, width] of a seeded stretch of one video.

    Raises:
        ValueError: it cannot be read, or is too short.
    """
    start = _start(film, frames, generator)
    return random_crop(_stretch(film, frames, start), height, width, generator, zoom)


def paired_clip(
    folder: Path, generator: torch.Generator, frames: int, height: int, width: int, zoom: float = 1.5
) -> tuple[Tensor, Tensor, str]:
    """The same crop of the same stretch of ``folder/condition/NAME`` and ``folder/target/NAME``, and the name.

    Raises:
        ValueError: partners differ in length or size, or are too short.
        OSError: a folder or a partner is missing.
    """
    pairs = find_pairs(folder)
    condition, target = pairs[pick(generator, len(pairs))]
    lengths = _frame_count(condition), _frame_count(target)
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"'{condition.name}' has {lengths[0]} frames in {CONDITION}/ and {lengths[1]} in {TARGET}/: "
            "pass pairs of equal length."
        )
    start = _start(condition, frames, generator)
    videos = [_stretch(path, frames, start) for path in (condition, target)]
    sizes = [f"{v.shape[2]}x{v.shape[3]}" for v in videos]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"'{condition.name}' has {sizes[0]} pixels in {CONDITION}/ and {sizes[1]} in {TARGET}/: "
            "pass pairs of equal size."
        )
    both = random_crop(torch.cat(videos), height, width, generator, zoom)  # one crop for both
    return both[:3].clone(), both[3:].clone(), condition.name


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


def _start(film: Path, frames: int, generator: torch.Generator) -> int:
    length = _frame_count(film)
    if length < frames:
        raise ValueError(
            f"'{film.name}' has {length} frames, but {frames} are needed: pass fewer frames or longer clips."
        )
    return pick(generator, length - frames + 1)


@lru_cache(maxsize=4096)
def _frame_count(film: Path) -> int:
    """Decoded once: what a container says about its length is often wrong."""
    try:
        with av.open(str(film)) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"'{film.name}' cannot be read as a video: {error}.") from error


def _stretch(film: Path, frames: int, start: int) -> Tensor:
    return to_unit(read_frames(film, frames, start))
