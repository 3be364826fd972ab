"""The full-size decoders: what people choose between, over all videos, and each prediction beside its measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.cases import ARCHITECTURE, EMBEDDED, Case, Inside, Method, frame_groups, label
from bench.page.results import Results, as_bytes, groups_of_videos, methods_of
from bench.page.targets import PAPER
from chopgrad import Chop, Exact, Full
from suite.tables import markdown_table

CHOSEN: tuple[Method, ...] = (
    Full(),
    Exact(offload=False),
    Exact(pieces=True),
    Inside("frame", Exact(pieces=True)),
    Chop(0),
    PAPER,
)
FEWEST_GROUPS = 2
"""Of a video whose peak is compared with that of a longer one: below that there is nothing to cut or to stream."""


def glance(results: Results) -> list[str]:
    """Lines of Markdown: time and peak over those of ``Full()``, least and largest over all videos, and how the peak
    grows with the video; nothing where no full-size decoder was measured.
    """
    rows = []
    for vae in _vaes(results):
        videos = list(dict.fromkeys(c.video for c in results.cases if c.vae == vae))
        for method in CHOSEN:
            cases = [replace(video, strategy=method) for video in videos]
            times = [t[0] for c in cases if (t := results.time(c))]
            pairs = [(results.measured(c), results.measured(c.video)) for c in cases]
            peaks = [ours.bytes / full.bytes for ours, full in pairs if ours and full]
            row = [_over(times), _over(peaks), _growth(results, cases)]
            if any(row):
                rows.append([f"{vae}, {label(method)}", *row])
    if not rows:
        return []
    header = ["decoder and strategy", "time / Full()", "peak / Full()", "peak of the longest / shortest video"]
    told = (
        "Least to largest over all videos, whose number is in brackets; all of it is measured. Longest and shortest: "
        f"of one size, and of at least {FEWEST_GROUPS} frame groups."
    )
    return [markdown_table(header, rows), "", told]


def accuracy(results: Results) -> list[str]:
    """Lines of Markdown: of every case the measured peak over the planner's; nothing where none is full-size."""
    lines: list[str] = []
    for vae in _vaes(results):
        videos = list(dict.fromkeys(c.video for c in results.cases if c.vae == vae))
        methods = dict.fromkeys(m for v in groups_of_videos(results.cases) for m in methods_of(results.cases, v))
        cells = {m: [_compared(results, replace(v, strategy=m)) for v in videos] for m in methods}
        shown = [k for k in range(len(videos)) if any(row[k] for row in cells.values())]
        rows = [[label(m), *(row[k] for k in shown)] for m, row in cells.items() if any(row)]
        if rows:
            header = [vae, *(f"{v.frames}f {v.height}x{v.width}" for v in (videos[k] for k in shown))]
            lines += ["", markdown_table(header, rows)]
    return ["Measured over predicted peak, and the measured peak:", *lines] if lines else []


def _vaes(results: Results) -> list[str]:
    return [vae for vae in dict.fromkeys(c.vae for c in results.cases) if vae not in EMBEDDED]


def _over(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low if low == high else f'{low} to {high}'} ({len(values)})"


def _growth(results: Results, cases: Sequence[Case]) -> str:
    """Of the pair of videos of one size whose lengths differ most."""
    known = {
        c: p
        for c in cases
        if (p := results.measured(c)) and frame_groups(ARCHITECTURE[c.vae], c.frames) >= FEWEST_GROUPS
    }
    pairs = [(a, b) for a in known for b in known if a.frames < b.frames and replace(b, frames=a.frames) == a]
    if not pairs:
        return ""
    short, long = max(pairs, key=lambda pair: pair[1].frames / pair[0].frames)
    at = f"{long.frames} / {short.frames} frames of {long.height}x{long.width}"
    return f"{known[long].bytes / known[short].bytes:.2f} ({at})"


def _compared(results: Results, case: Case) -> str:
    ratio, peak = results.predicted_over_measured(case), results.measured(case)
    return f"{1 / ratio:.3f} ({as_bytes(peak.bytes)})" if ratio and peak else ""
