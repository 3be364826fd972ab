"""What each strategy costs, at a glance: memory and time over those of full back-propagation, and the error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bench.baselines import Baseline
from bench.cases import EMBEDDED, Case, Method, is_exact, label
from bench.page.results import Results, as_bytes
from bench.page.targets import ON_HOST, PAPER
from chopgrad import Sampled
from suite.tables import markdown_table, with_interval

KNOWN_AS: Mapping[Method, str] = {PAPER: " (the paper's)"}
NO_ERROR = 0.0005
"""Relative error that is rounding."""
LEGEND = """\
Peak and time: as ratios to `Full()`, which is ordinary back-propagation; the peak is counted without weights, latents
and target. Error: of the gradient at the latents, relative; of an estimate, that of one draw. Baselines are what people
do without this library, and some of them decode something else. Time of `Full()` against itself is noise."""


def costs(results: Results) -> list[str]:
    """Lines of Markdown: a row a strategy, at one video of each decoder. Cells of what was not measured stay empty."""
    vaes = dict.fromkeys(c.vae for c in results.cases)
    videos = {vae: v for vae in vaes if (v := representative(results, vae))}
    at = {(c.video, c.strategy): c for c in results.cases if c.video in videos.values()}
    rows = []
    for method in sorted(dict.fromkeys(method for _, method in at), key=_rank):
        cells: list[str] = []
        for video in videos.values():
            case = at.get((video, method))
            cost = (_peak(results, case), _time(results, case)) if case else ("", "")
            cells += [*cost, _error(results, case) if case and any(cost) else ""]
        if any(cells):
            rows.append([label(method) + kind(method) + KNOWN_AS.get(method, ""), *cells])
    if not rows:
        return []
    header = ["strategy", *(f"{vae}: {column}" for vae in videos for column in ("peak", "time", "error"))]
    shown = [k for k in range(len(header)) if k == 0 or any(row[k] for row in rows)]
    table = markdown_table([header[k] for k in shown], [[row[k] for k in shown] for row in rows])
    named = [f"{vae}, {v.frames} frames of {v.height}x{v.width}, {v.loss.upper()}" for vae, v in videos.items()]
    lines = ["Of each decoder the video of which most is known (of equals the largest):", f"{'; '.join(named)}.", ""]
    lines += [table, "", LEGEND]
    if "*p*" in table:
        lines.append("*p*: predicted by the planner, not measured.")
    if "*t*" in table:
        lines.append("*t*: without transfers to host memory, since a CPU has nowhere to offload to.")
    if any(video.vae not in EMBEDDED for video in videos.values()):
        lines.append("Weights of full-size decoders are random, which says nothing of an error: none is shown.")
    return lines


def representative(results: Results, vae: str) -> Case | None:
    """The video of a decoder of which most is measured; of equals most is predicted, then the largest; None where
    nothing is known.
    """
    same = [(c, c.video) for c in results.cases if c.vae == vae]
    references = {video: results.reference(video) for video in dict.fromkeys(video for _, video in same)}
    measured, predicted = (dict.fromkeys(references, 0) for _ in range(2))
    for case, video in same:
        found = (results.measured(case), results.time(case, references[video]), results.error(case))
        measured[video] += sum(x is not None for x in found)
        predicted[video] += results.predicted(case) is not None
    best = max(references, key=lambda v: (measured[v], predicted[v], v.frames * v.height * v.width), default=None)
    return best if best and measured[best] + predicted[best] else None


def kind(method: Method) -> str:
    """A mark behind the name of what is no strategy, or one that draws."""
    return " (baseline)" if isinstance(method, Baseline) else " (estimate)" if isinstance(method, Sampled) else ""


def _rank(method: Method) -> int:
    """Exact gradients first, then truncated ones, estimates, and what people do without the library."""
    return 3 if isinstance(method, Baseline) else 2 if isinstance(method, Sampled) else 0 if is_exact(method) else 1


def _peak(results: Results, case: Case) -> str:
    ours, full = results.peak(case), results.peak(case.video)
    ran_out = results.ran_out(case) and not results.measured(case)
    text = ""
    if ours:
        ratio = ours.bytes / full.bytes if full else 1.0
        text = f"{ratio:.{2 if ratio >= 0.1 else 3}f}" if full else as_bytes(ours.bytes)
        if ours.kind == "predicted" or (full and full.kind == "predicted"):
            text = f"*p* {text}"
    return f"out of memory {f'({text})' if text else ''}".strip() if ran_out else text


def _time(results: Results, case: Case) -> str:
    reference = results.reference(case.video)
    against = "" if reference == "Full()" else f" of {reference}"
    if found := results.time(case, reference):
        return with_interval(found, 2) + against
    if (results.metrics("time", case) or {}).get("out_of_memory"):
        return "out of memory"
    stand_in = ON_HOST.get(case.strategy)
    if stand_in and (found := results.time(replace(case, strategy=stand_in), reference)):
        return f"*t* {with_interval(found, 2)}{against}"
    return ""


def _error(results: Results, case: Case) -> str:
    error = results.error(case)
    if error is None:
        return "exact" if is_exact(case.strategy) else ""
    return "exact" if is_exact(case.strategy) and error[0] < NO_ERROR else f"{error[0]:.2f}"
