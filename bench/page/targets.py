"""The targets: reached, not reached, undecided, or not measured here; with the numbers, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.cases import Case, Inside, Method, is_exact, label
from bench.page.flatness import flatness, flatness_predicted
from bench.page.results import Results, as_bytes, groups_of_videos
from bench.page.verdict import Verdict, judge, missing
from bench.published import CASES, FOLDER, GIB, TARGETS_GIB, Row, least_exact, predictions
from chopgrad import Chop, Exact, Full, Strategy

OFFLOAD, PIECES = Exact(offload=True), Exact(offload=True, pieces=True)
LEAST = Inside("frame", PIECES)
"""What reaches the targets of memory."""
LOOK_AHEAD, PAPER = Chop(1, block=8), Chop(1)
ON_HOST: dict[Method, Method] = {
    OFFLOAD: Exact(offload=False),
    PIECES: Exact(pieces=True),
    LEAST: Inside("frame", Exact(pieces=True)),
}
"""The same work without transfers: all that a CPU, which has nowhere to offload to, can time."""
RUN_PREDICTIONS = "run python analysis/predicted_memory.py"


def targets(results: Results, predicted: Path = FOLDER) -> list[Verdict]:
    """Every target; ``predicted`` is the folder of the planner's records of the published architectures."""
    by_size = predictions(predicted) if predicted.is_dir() else {}
    return [
        *flatness(results),
        *flatness_predicted(by_size),
        *times(results),
        *offload_memory(results),
        *resolutions(results, by_size),
    ]


def times(results: Results) -> Iterator[Verdict]:
    """Ratios of times, at the largest video of each VAE where full back-propagation fits."""
    for vae in dict.fromkeys(c.vae for c in results.cases):
        compared = (OFFLOAD, PIECES, *ON_HOST.values(), LOOK_AHEAD)
        timed = [
            c.video
            for c in results.cases
            if c.vae == vae and c.strategy in compared and results.time(c) and results.time(c.video)
        ]
        if not timed:
            yield missing(f"times: {vae}")
            continue
        video = max(timed, key=lambda c: (c.loss == "mse", c.frames * c.height * c.width))
        where = f"{vae}, {video.frames} frames of {video.height}x{video.width}"
        yield _limit(results, video, OFFLOAD, 1.40, where)
        yield _limit(results, video, PIECES, 1.75, where)
        yield _limit(results, video, LEAST, 1.75, where)
        yield _faster(results, video, OFFLOAD, where)
        yield _faster(results, video, LOOK_AHEAD, where)


def _limit(results: Results, video: Case, strategy: Method, limit: float, where: str) -> Verdict:
    target = f"{label(strategy)} <= {limit:.2f} of the time of Full(): {where}"
    return _timed(results, video, strategy, target, (limit, limit, limit), "")


def _faster(results: Results, video: Case, strategy: Strategy, where: str) -> Verdict:
    target = f"{label(strategy)} takes less time than the paper's {label(PAPER)}: {where}"
    paper = results.time(replace(video, strategy=PAPER))
    return _timed(results, video, strategy, target, paper, f" against {_interval(paper)}") if paper else missing(target)


def _timed(
    results: Results, video: Case, strategy: Method, target: str, limit: Sequence[float], against: str
) -> Verdict:
    if found := results.time(replace(video, strategy=strategy)):
        return Verdict(target, _compared(found, limit), _interval(found) + against, "measured")
    stand_in = ON_HOST.get(strategy)
    if stand_in is not None and (found := results.time(replace(video, strategy=stand_in))):
        numbers = f"without transfers, {label(stand_in)}: {_interval(found)}{against}"
        # Transfers only add to it.
        missed = _compared(found, limit) == judge(False)
        return Verdict(target, judge(False) if missed else "not measured here", numbers, "stand-in")
    return missing(target)


def _compared(ratio: Sequence[float], limit: Sequence[float]) -> str:
    """Of two means with their intervals."""
    if ratio[2] <= limit[1]:
        return judge(True)
    return judge(False) if ratio[1] > limit[2] else "undecided"


def _interval(ratio: Sequence[float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def offload_memory(results: Results) -> Iterator[Verdict]:
    """Less device memory than the paper's scheme, at every length."""
    for video in groups_of_videos(results.cases):
        pairs = []
        for case in results.cases:
            if case.strategy == OFFLOAD and replace(case.video, frames=video.frames) == video:
                ours, paper = results.peak(case), results.peak(replace(case, strategy=PAPER))
                if ours and paper:
                    pairs.append((case, ours, paper))
        if pairs:
            case, ours, paper = max(pairs, key=lambda p: p[1].bytes / p[2].bytes)
            target = f"{label(OFFLOAD)} needs less device memory than the paper's {label(PAPER)}: {video.vae}, "
            target += f"{video.height}x{video.width}, {video.loss.upper()}, {len(pairs)} lengths"
            numbers = f"at {case.frames} frames {as_bytes(ours.bytes)} ({ours.kind}) against {as_bytes(paper.bytes)} "
            numbers += f"({paper.kind})"
            yield Verdict(target, judge(ours.bytes < paper.bytes), numbers, ours.kind)


def resolutions(results: Results, by_size: dict[tuple[str, int, int], dict[int, dict[str, Row]]]) -> Iterator[Verdict]:
    """An exact gradient in little device memory (weights included), against Full and the paper's D = 1."""
    for name, limit in TARGETS_GIB.items():
        vae, frames, height, width = CASES[name]
        target = f"exact gradient in at most {limit} GiB: full-size {vae}, {frames} frames of {height}x{width}"
        rows = by_size.get((vae, height, width), {}).get(frames, {})
        totals = {k: (r["device_bytes"], "predicted") for k, r in rows.items()}
        exact = {least_exact(rows)["strategy"]} if rows else set()
        for case in results.cases:
            same = (case.vae, case.frames, case.height, case.width) == (f"full:{vae}", frames, height, width)
            if same and case.loss == "mse" and (peak := results.measured(case)):
                totals[label(case.strategy)] = (round(peak.total_bytes), "measured")
                exact |= {label(case.strategy)} if is_exact(case.strategy) else set()
        if not exact:
            yield missing(target, RUN_PREDICTIONS)
            continue
        # A measurement stands in for its own prediction; of another strategy it decides nothing.
        best = min(exact, key=lambda k: totals[k][0])
        least, kind = totals[best]
        others = [k for k in (label(Full()), label(PAPER)) if k in totals]
        against = ", ".join(f"{k} {as_bytes(totals[k][0])} ({totals[k][1]})" for k in others)
        yield Verdict(target, judge(least <= limit * GIB), f"{best} {as_bytes(least)}; {against}", kind)
