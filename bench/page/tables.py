"""The page of the benchmark, from its records only: what each strategy costs, then all that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.baselines import Baseline
from bench.cases import EMBEDDED, Case, label, refusals, uses_host
from bench.page.costs import costs, kind
from bench.page.full_size import accuracy, glance
from bench.page.results import Results, as_bytes, frames_of, groups_of_videos, methods_of
from bench.page.scaling import CONSTANT, STRAIGHT, claims
from bench.page.targets import targets
from bench.selection import Selection
from chopgrad import Sampled
from suite.records import Record
from suite.tables import markdown_table

BENCHMARKS = {
    "bench-cpu": Selection(),
    "bench-full-cuda": Selection(full=True, device="cuda"),
    "bench-published": Selection(published=True),
}
"""The pages that ``python -m bench`` writes by default, by name."""
EXPLANATION = """\
Peak: device memory that the loss and its backward pass add to weights, latents and target. *p*: not measured but
predicted by the planner; every other number is measured. p/m: predicted over measured peak, over all lengths.
Time: ratio to full back-propagation timed right before (mean and 95 % bootstrap interval over rounds). Where that does
not fit, it is the ratio to the strategy that is named.
Error: relative error of the gradient at the latents against full back-propagation, on crops of a held-out clip (mean
and 95 % interval). Of an estimate, whose gradient is random, that of one call (root mean square over all draws).
"""
SCALING = "Do memory and time scale as the paper says?"
"""Heading of what Fig. 6 of the paper says."""
JUDGED_BY = f"""\
Fig. 6 of arXiv 2603.17812, for `Chop(D)` at distances that are shorter than the video. *Linear*: R^2 of a line is at
least {STRAIGHT}; *does not depend*: the longest video takes at most {CONSTANT} times the peak of the shortest."""
OWN_TARGETS = """\
What this project set itself to reach, beyond what the paper says; not all of it is reached. The last column says
where the numbers come from (*stand-in*: measured, of the same work without transfers)."""


def report(folder: Path, cases: Sequence[Case], name: str) -> str:
    """Markdown: where it was measured, what each strategy costs, figures, one table per VAE, size and loss, how good
    the predictions are, and the targets.
    """
    results = Results(folder, cases)
    if not results.records:
        return "No case was measured.\n"
    lines = ["# Peak memory, time and gradient error of gradient strategies", ""]
    lines += [_made_by(list(results.records.values())), ""]
    if overview := costs(results):
        lines += ["## What each strategy costs", "", *overview, ""]
    if at_a_glance := glance(results):
        lines += ["## Full-size decoders at a glance", "", *at_a_glance, ""]
    lines += [f"![Curves]({name}.png)", "", f"![Frontier]({name}-frontier.png)", ""]
    if scaling := [c for found in claims(results).values() for c in found]:
        rows = [[c.statement, f"**{c.verdict}**", c.evidence] for c in scaling]
        lines += [f"## {SCALING}", "", JUDGED_BY, ""]
        lines += [markdown_table(["statement", "verdict", "numbers"], rows), ""]
    lines += ["## All measurements", "", EXPLANATION.rstrip()]
    if any(uses_host(c.strategy) and c.device == "cpu" for c in cases):
        lines += [
            "On a CPU there is nowhere to offload to: memory of what does is predicted, its time is not measured."
        ]
    left = [video for video in groups_of_videos(cases) if not results.knows(video)]
    for video in groups_of_videos(cases):
        lines += ["", *_section(results, video)] if video not in left else []
    if left:
        lines += ["", f"Nothing is known yet of {'; '.join(f'{v.vae}, {v.height}x{v.width}' for v in left)}."]
    lines += ["", "## How good the predictions are, and the clock", "", _accuracy(results), *_noise(results)]
    if compared := accuracy(results):
        lines += ["", *compared]
    lines += ["", "## Targets of this project", "", OWN_TARGETS, ""]
    lines += [markdown_table(["target", "verdict", "numbers", "from"], targets(results))]
    return "\n".join(lines) + "\n"


def _made_by(records: Sequence[Record]) -> str:
    """Of the first measurement, and how many others there are; of predictions where nothing was measured."""
    measured = [r for r in records if "device_bytes" not in r.metrics] or list(records)
    p = measured[0].provenance
    devices, commits = (sorted({str(r.provenance[k]) for r in measured}) for k in ("device", "commit"))
    if len(devices) > 1:  # ratios within a video are still those of one card
        return f"**Measured on {len(devices)} devices, whose numbers do not compare:** {'; '.join(devices)}."
    code = f"commit {(p['commit'] or 'unknown')[:10]}{' with local changes' if p['dirty'] else ''}"
    return (
        f"Measured on {p['device']} ({p['threads']} threads), torch {p['torch']}, diffusers {p['diffusers']}, "
        f"Python {p['python']}, {code}{f' and {len(commits) - 1} more' if len(commits) > 1 else ''}, "
        f"{p['date'][:10]}: `{p['command'].strip()}`."
    )


def _accuracy(results: Results) -> str:
    ratios = {c: r for c in results.cases if (r := results.predicted_over_measured(c)) is not None}
    if not ratios:
        return "Predictions: no case was both predicted and measured."
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    within = sum(abs(r - 1) <= 0.05 for r in ratios.values())
    verdict = "within 5 %" if within == len(ratios) else f"NOT within 5 % in {len(ratios) - within} cases"
    return (
        f"Predictions: {len(ratios)} cases were both predicted and measured; predicted / measured peak lies between "
        f"{ratios[low]:.3f} ({low.name}) and {ratios[high]:.3f} ({high.name}): {verdict}."
    )


def _noise(results: Results) -> list[str]:
    """How far full back-propagation, timed against itself, is from 1."""
    found = [(c, r) for c in results.cases if c == c.video and (r := results.time(c))]
    if not found:
        return []
    case, ratio = max(found, key=lambda pair: abs(pair[1][0] - 1))
    return [
        f"\nNoise of the clock: full back-propagation against itself is off by up to {abs(ratio[0] - 1):.2f} "
        f"({case.name}: {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]); times that differ by less do not differ."
    ]


def _section(results: Results, video: Case) -> list[str]:
    frames = frames_of(results.cases, video)
    known = {c.name for c in results.cases}
    lines = [f"### {video.vae}, {video.height}x{video.width}, {video.loss.upper()}, {video.dtype}", ""]
    columns: dict[str, list[str]] = {"strategy": []}
    for method in methods_of(results.cases, video):
        at = [replace(video, frames=n, strategy=method) for n in frames]
        columns["strategy"].append(label(method) + kind(method))
        for n, case in zip(frames, at, strict=True):
            columns.setdefault(f"{n} frames, peak", []).append(_peak(results, case) if case.name in known else "")
        for n, case in zip(frames, at, strict=True):
            columns.setdefault(f"{n} frames, time", []).append(_time(results, case))
        errors = [f"{e[0]:.3f} [{e[1]:.3f}, {e[2]:.3f}]" for c in at if (e := results.error(c))]
        columns.setdefault("error", []).append(errors[0] if errors else "" if video.vae in EMBEDDED else "n/a")
        ratios = [r for c in at if (r := results.predicted_over_measured(c)) is not None]
        spread = {f"{min(ratios):.3f}", f"{max(ratios):.3f}"} if ratios else set()
        columns.setdefault("p/m", []).append(" to ".join(sorted(spread)))
    shown = {k: v for k, v in columns.items() if any(v)}
    lines.append(markdown_table(list(shown), list(zip(*shown.values(), strict=True))))
    if any(isinstance(method, Baseline) for method in methods_of(results.cases, video)):
        lines += [f"\n{sentence}" for sentence in refusals(video.vae, video.height, video.width)]
    compared = [
        c
        for c in results.cases
        if isinstance(c.strategy, Baseline) and replace(c.video, frames=0) == replace(video, frames=0)
    ]
    estimates = [c for c in results.cases if replace(c.video, frames=0) == replace(video, frames=0)]
    lines += [f"\n{s}" for c in estimates if (s := _spread(results, c))]
    lines += [f"\n{s}" for c in compared if (s := _difference(results, c))]
    if video.vae not in EMBEDDED:
        lines.append("\nError n/a: random weights have no temporal locality, so an error through them says nothing.")
    return lines


def _peak(results: Results, case: Case) -> str:
    peak = results.peak(case)
    if results.ran_out(case) and not results.measured(case):
        return "out of memory" + (f" (*p* {as_bytes(peak.bytes)})" if peak else "")
    if peak is None:
        return "not measured"
    return ("*p* " if peak.kind == "predicted" else "") + as_bytes(peak.bytes)


def _time(results: Results, case: Case) -> str:
    m = results.metrics("time", case)
    if m is None:
        return ""
    if m["out_of_memory"]:
        return "out of memory"
    mean, low, high = m["ratio_to_reference"]
    against = "" if m["reference"] == "Full()" else f" of {m['reference']}"
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]{against}"


def _spread(results: Results, case: Case) -> str | None:
    """What the error of an estimate consists of."""
    m = results.metrics("gradient_error", case)
    if m is None or not isinstance(case.strategy, Sampled):
        return None
    mean, variance = m["relative_error_of_mean"][0], m["relative_variance"][0]
    return (
        f"{label(case.strategy)} is an estimate, unbiased for {label(case.strategy.strategy)}. With g the gradient of "
        f"full back-propagation and b its own, the relative error of its mean, |E b - g| / |g|, is {mean:.3f} and its "
        f"relative variance, E|b - E b|^2 / |g|^2, {variance:.3f} (both exact over all draws). The error in the table "
        "is the root of the former squared plus the latter. Its peak is that of the draw that needs most, and every "
        "timed call draws anew."
    )


def _difference(results: Results, case: Case) -> str | None:
    """What a baseline that is not exact decodes, and which error is left when only its own frames count."""
    m = results.metrics("gradient_error", case)
    if m is None or case.strategy.exact:  # type: ignore[union-attr]
        return None
    return (
        f"{label(case.strategy)} compares {m['frames_compared']} of {case.frames} frames; they differ from those of "
        f"the plain decode by {m['frames_rms_difference'][0]:.3f} (root mean square, of a range of 2). Its gradient "
        f"has relative error {m['relative_error'][0]:.2f} against the whole video's loss (best-scaled "
        f"{m['best_scaled_error'][0]:.2f}), and {m['relative_error_same_frames'][0]:.2f} against the exact gradient of "
        "the loss on the frames that it compares."
    )
