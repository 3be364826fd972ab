"""What the paper says of memory and time (Sec. 3.3, Fig. 6), judged on the records of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bench.cases import ARCHITECTURE, Case, frame_groups, label
from bench.page.results import Results, as_bytes
from bench.selection import PAPER
from chopgrad import Chop, Full
from suite.claims import Claim, Verdict
from suite.tables import with_interval

STRAIGHT = 0.97
"""Least R^2 of a line over the distances that counts as linear."""
CONSTANT = 1.05
"""Largest growth of the peak, from the shortest to the longest video, that counts as none."""
FEWEST = 3
"""Distances that a line must pass by: any two lie on one."""


def claims(results: Results) -> dict[str, list[Claim]]:
    """VAE -> the statements of Fig. 6 that its records decide; where too little was measured there is none."""
    return {vae: list(_of(results, vae)) for vae in dict.fromkeys(c.vae for c in results.cases)}


def _of(results: Results, vae: str) -> Iterator[Claim]:
    videos = sorted({c.video for c in results.cases if c.vae == vae}, key=lambda v: (v.frames, v.height * v.width))
    yield from _memory_by_distance(results, videos[::-1])
    yield from _memory_by_length(results, videos)
    yield from _time_by_distance(results, videos[::-1])


def _memory_by_distance(results: Results, longest_first: Sequence[Case]) -> Iterator[Claim]:
    for video in longest_first:
        peaks = {m.distance: p.bytes for m in _distances(video) if (p := results.measured(replace(video, strategy=m)))}
        if len(peaks) >= FEWEST:
            numbers = f"{', '.join(f'D={d} {as_bytes(y)}' for d, y in peaks.items())} at {_named(video)}"
            yield _line("Peak memory is linear in the truncation distance", video, peaks, numbers)
            return


def _time_by_distance(results: Results, longest_first: Sequence[Case]) -> Iterator[Claim]:
    for video in longest_first:
        reference = results.reference(video)
        times = {m.distance: t for m in _distances(video) if (t := results.time(replace(video, strategy=m), reference))}
        if len(times) >= FEWEST:
            listed = ", ".join(f"D={d} {with_interval(t, 2)}" for d, t in times.items())
            numbers = f"{listed} of the time of {reference} at {_named(video)}"
            means = {d: t[0] for d, t in times.items()}
            yield _line("Time is linear in the truncation distance", video, means, numbers)
            return


def _memory_by_length(results: Results, videos: Sequence[Case]) -> Iterator[Claim]:
    best: tuple[float, Case, Case] | None = None
    for short in videos:
        for long in (v for v in videos if replace(v, frames=short.frames) == short):
            times = long.frames / short.frames
            if times >= 2 and (best is None or times > best[0]) and _growth(results, short, long):
                best = times, short, long
    if best is None:
        return
    times, short, long = best
    growth = _growth(results, short, long)
    full = [results.measured(v) for v in (short, long)]
    against = f"; {label(Full())} {full[1].bytes / full[0].bytes:.2f}" if full[0] and full[1] else ""
    yield Claim(
        f"Peak memory does not depend on the length of the video ({short.vae}).",
        "Fig. 6",
        "holds" if max(growth.values()) <= CONSTANT else "fails",
        f"peak at {long.frames} over that at {_named(short)}: "
        f"{', '.join(f'D={d} {ratio:.3f}' for d, ratio in growth.items())}{against}",
    )


def _growth(results: Results, short: Case, long: Case) -> dict[int, float]:
    """Truncation distance -> measured peak of the long video over that of the short one."""
    found = {}
    for method in _distances(short):
        a, b = (results.measured(replace(video, strategy=method)) for video in (short, long))
        if a and b:
            found[method.distance] = b.bytes / a.bytes
    return found


def _distances(video: Case) -> list[Chop]:
    """The paper's scheme, at distances that with a group and the next one still fit into the video."""
    # In a shorter video a longer distance costs no more: that would bend the line, and hide growth with the length.
    groups = frame_groups(ARCHITECTURE[video.vae], video.frames)
    return [m for m in PAPER if isinstance(m, Chop) and m.distance + 2 <= groups]


def _line(statement: str, video: Case, by_distance: Mapping[int, float], numbers: str) -> Claim:
    x, y = np.array(list(by_distance)), np.array(list(by_distance.values()), dtype=float)
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    spread = np.square(y - y.mean()).sum()
    straight = 1 - np.square(left).sum() / spread if spread else 1.0
    verdict: Verdict = "holds" if straight >= STRAIGHT else "fails"
    return Claim(f"{statement} ({video.vae}).", "Fig. 6", verdict, f"R^2 of a line {straight:.3f}: {numbers}")


def _named(video: Case) -> str:
    return f"{video.frames} frames of {video.height}x{video.width}"
