"""A video file read in part, with PyAV: its length, and some of its frames without the rest of it in memory.

A film is never held whole: its packets are counted, which decodes nothing, and frames are decoded from the keyframe
before the first one that is asked for. They are exactly those that decoding from the beginning gives: each is known by
its presentation time, and where such times cannot be trusted a film is decoded from its first frame on, one frame at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import numpy as np

SOUGHT = ("mov", "matroska"), ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "prores", "ffv1")
"""Containers that keep presentation times, and codecs of which each packet is one shown frame (of VP8, not each)."""


@dataclass(frozen=True)
class Index:
    """Where the frames of a film are.

    Attributes:
        length: how many there are.
        times: presentation time of each, in the stream's unit; none where the film is decoded from its beginning.
        keyframes: presentation times of those from which decoding can begin.
    """

    length: int
    times: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()


def index(path: Path) -> Index:
    """Where the frames of a film are; remembered until the file changes.

    Cost: the file is read once, and its first frame decoded; where times cannot be trusted, all frames are decoded.

    Raises:
        ValueError: it is no video, has no video stream or no frame, or breaks off.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ValueError(f"'{Path(path).name}' cannot be read as a video: {error.strerror}.") from error
    found = _remembered(Path(path), stat.st_mtime_ns, stat.st_size)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def pictures(path: Path, start: int = 0, limit: int | None = None) -> Iterator[np.ndarray]:
    """Frames start, start + 1, ... of a film, at most ``limit`` of them, upright, each uint8 [H, W, 3].

    Cost: of time, decoding from the keyframe before; of memory, a few frames.

    Raises:
        ValueError: as ``index``; or something is damaged up to the last of these frames.
    """
    shown = None
    for frame in _decoded(path, start, limit):
        shown = shown or _shown(frame)
        yield _upright(frame.to_ndarray(format="rgb24"), *shown)


def stretch(path: Path, start: int, frames: int) -> Iterator[np.ndarray]:
    """The same, exactly so many frames.

    Raises:
        ValueError: as ``pictures``; or there are fewer.
    """
    given = 0
    for picture in pictures(path, start, frames):
        yield picture
        given += 1
    if given < frames:
        raise ValueError(f"'{Path(path).name}' cannot be read to its end: it has no frame {start + given}.")


def _decoded(path: Path, start: int = 0, limit: int | None = None) -> Iterator[Any]:
    """Frames as PyAV gives them."""
    stop = None if limit is None else start + limit
    times = index(path).times[start:stop] if start else ()
    given = 0
    if times:
        with _opened(path) as (container, stream):
            container.seek(max(key for key in index(path).keyframes if key <= times[0]), stream=stream)
            later = dropwhile(lambda frame: frame.pts is None or frame.pts < times[0], container.decode(stream))
            for time, frame in zip(times, later):
                if frame.pts != time:
                    break
                yield frame
                given += 1
        if given == len(times):
            return
    yield from islice(_from_the_beginning(path), start + given, stop)


def _shown(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d): a player shows a stored pixel at (x, y) at (a x + c y, b x + d y). Of a film it is always the same.

    PyAV keeps a frame that was asked for its side data until garbage is collected, so only one is asked.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return a, b, c, d
    return 1, 0, 0, 1


def _upright(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Turned and mirrored as a player does: phones store what the sensor saw, and beside it how to show it."""
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@lru_cache(maxsize=4096)
def _remembered(path: Path, modified: int, size: int) -> Index | str:
    """The index, or what is wrong with the film."""
    try:
        return _scanned(path)
    except ValueError as error:
        return str(error)


def _scanned(path: Path) -> Index:
    with _opened(path) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        containers, codecs = SOUGHT
        kind = next((name for name in containers if container.format.name.startswith(name)), None)
        trusted = kind is not None and stream.codec_context.codec.canonical_name in codecs
        if kind == "mov" and len(packets) < stream.frames:  # its table of samples is complete or damaged
            raise ValueError(
                f"'{path.name}' cannot be read to its end: only {len(packets)} of its {stream.frames} frames are there."
            )
    times = [time for time, _, discarded in packets if not discarded]
    if trusted and times and None not in times and len(set(times)) == len(times):
        times.sort()
        keys = [time for time, key, _ in packets if key and time is not None]
        first = next(_from_the_beginning(path), None)
        if first is not None and first.pts == times[0] and min(keys, default=times[-1] + 1) <= times[0]:
            return Index(len(times), tuple(times), tuple(keys))
    length = sum(1 for _ in _from_the_beginning(path))
    if not length:
        raise ValueError(f"'{path.name}' has no frame.")
    return Index(length)


def _from_the_beginning(path: Path) -> Iterator[Any]:
    with _opened(path) as (container, stream):
        yield from container.decode(stream)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream)."""
    name = Path(path).name
    try:
        import av  # here, so that what reads no video does without it
    except ModuleNotFoundError:
        raise ValueError(f"'{name}' cannot be read without PyAV: run 'pip install av'.") from None
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"'{name}' cannot be read as a video: {error.strerror}.") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"'{name}' has no video stream.")
        try:
            yield container, container.streams.video[0]
        except av.FFmpegError as error:
            raise ValueError(f"'{name}' cannot be read to its end: {error.strerror}.") from error
