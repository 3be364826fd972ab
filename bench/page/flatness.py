"""Is device memory constant in the number of frames? The peak of a long video over that of a short one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from bench.baselines import Baseline
from bench.cases import SWEEP, Method, frame_groups, label, plain
from bench.page.results import Results, groups_of_videos
from bench.page.verdict import Verdict, judge
from bench.published import Row
from chopgrad import Chop

SHORT, LONG, LIMIT = 25, 193, 1.02
BY_LABEL: dict[str, Method] = {label(s): s for s in SWEEP}


def flatness(results: Results) -> Iterator[Verdict]:
    """Of the cases at hand: measured where they can be, else predicted."""
    for video in groups_of_videos(results.cases):
        ratios: dict[str, dict[str, float]] = {"measured": {}, "predicted": {}}
        for case in results.cases:
            if case.frames != LONG or replace(case.video, frames=video.frames) != video or not _is_flat(case.strategy):
                continue
            short, long = results.peak(replace(case, frames=SHORT)), results.peak(case)
            if short and long and short.kind == long.kind:
                ratios[long.kind][label(case.strategy)] = long.bytes / short.bytes
        for kind, found in ratios.items():
            yield from _rows(f"{video.vae}, {video.height}x{video.width}", video.vae, found, kind)


def flatness_predicted(
    predictions: Mapping[tuple[str, int, int], Mapping[int, Mapping[str, Row]]],
) -> Iterator[Verdict]:
    """Of the published architectures, from ``analysis/predicted_memory.py`` (weights included)."""
    for (vae, height, width), at in predictions.items():
        if SHORT in at and LONG in at:
            found = {
                name: at[LONG][name]["device_bytes"] / at[SHORT][name]["device_bytes"]
                for name in at[LONG]
                if name in at[SHORT] and name in BY_LABEL and _is_flat(BY_LABEL[name])
            }
            yield from _rows(f"full-size {vae}, {height}x{width}", vae, found, "predicted")


def _is_flat(method: Method) -> bool:
    """Strategies that promise constant device memory: truncated ones, and exact ones whose states are on the host."""
    method = plain(method)
    return isinstance(method, Chop) or (not isinstance(method, Baseline) and bool(getattr(method, "offload", False)))


def _rows(where: str, vae: str, ratios: Mapping[str, float], kind: str) -> Iterator[Verdict]:
    groups = frame_groups(vae.removeprefix("full:"), SHORT)
    full = {name: ratio for name, ratio in ratios.items() if _window(name) <= groups}
    if full:
        yield _verdict(where, full, kind)
    if longer := {name: ratio for name, ratio in ratios.items() if name not in full}:
        # The short video is shorter than their window of block + D groups, so it takes less than the strategy's peak.
        yield _verdict(f"{where}, windows longer than the {groups} groups of {SHORT} frames", longer, kind)


def _verdict(where: str, ratios: Mapping[str, float], kind: str) -> Verdict:
    worst = max(ratios, key=ratios.__getitem__)
    above = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if ratio > LIMIT]
    numbers = f"{len(ratios)} strategies, largest {ratios[worst]:.3f} ({worst})"
    target = f"peak at {LONG} / {SHORT} frames <= {LIMIT}: {where}"
    return Verdict(target, judge(not above), numbers + (f"; above: {', '.join(above)}" if above else ""), kind)


def _window(name: str) -> int:
    """Frame groups that a strategy holds at one time, counting the next one."""
    strategy = plain(BY_LABEL[name])
    return strategy.block + strategy.distance + 1 if isinstance(strategy, Chop) else 1
