"""Other ways to spend the same compute than a fixed truncation distance: ``python analysis/estimators.py``.

Four alternatives to the paper's ``Chop(D)``, on latents that a restoring backbone made and that the trained decoder
decodes:

- look-ahead blocks: error against cost at equal memory (``Chop(D, block=W)`` holds W + D graphs);
- randomised truncation: unbiased, at the price of variance (``analysis.random_truncation``). Its squared error against
  the biased truncation's at equal expected cost, for one clip and for the mean of n clips;
- sampled losses (``chopgrad.Sampled``): added variance against the variance of the data, and the time saved;
- adaptive distance (``chopgrad.Adaptive``): realised error against its tolerance, and its cost.

Variances are exact sums over all draws, not estimates from samples; intervals are over clips.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import chopgrad
from analysis import random_truncation as rt
from analysis.mean_gradient import bootstrap_counts, mean_products
from chopgrad import Adaptive, Chop, Exact, Sampled, Strategy
from chopgrad.planner import relative_compute
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.claims import Claim, Verdict
from suite.pairwise import truncated
from suite.records import ROOT, Record
from suite.restoration import Restoration, in_full_precision
from suite.restoration_settings import TaskSettings
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CASES = ("look_ahead", "randomised", "sampled", "adaptive")
AVERAGED = 80
"""Clips that one update may be worth of: batches of 8 and Adam's memory of ten steps."""


@dataclass
class Config:
    """Settings of the comparison."""

    full: bool = False
    """The committed run: more clips and more repetitions."""
    task: TaskSettings = field(default_factory=TaskSettings)
    size: int | None = None
    """Height and width of the clips, in place of task.size (default: 32, or 64 with --full)."""
    cases: tuple[str, ...] = CASES
    count: int | None = None
    """Clips (default: 8, or 48 with --full)."""
    distances: tuple[int, ...] = (1, 2, 4)
    """Mean distances of the randomised truncation: it costs on average what ``Chop`` of that distance costs."""
    tolerances: tuple[float, ...] = (0.1, 0.2, 0.4)
    calls: int | None = None
    """Calls of the adaptive strategy per tolerance (default: 6, or 20 with --full)."""
    repeats: int | None = None
    """Interleaved timings of the sampled losses (default: 3, or 10 with --full)."""
    seed: int = 0
    out: Path | None = None
    """Folder of the records (default: runs/theory, or results/theory with --full)."""

    def __post_init__(self) -> None:
        self.size = self.size or (64 if self.full else self.task.size)
        self.task = replace(self.task, size=self.size)
        self.count = self.count or (48 if self.full else 8)
        self.calls = self.calls or (20 if self.full else 6)
        self.repeats = self.repeats or (10 if self.full else 3)
        self.out = self.out or ROOT / ("results" if self.full else "runs") / "theory"

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.count and self.calls and self.repeats
        unknown = [c for c in self.cases if c not in CASES]
        if unknown:
            raise ValueError(f"Unknown case '{unknown[0]}': pass some of {', '.join(CASES)}.")
        if self.count < 4 or min(self.calls, self.repeats) < 1 or min(self.tolerances, default=1) <= 0:
            raise ValueError(
                "At least 4 clips, 1 call, 1 repeat and tolerances above 0 are needed, got "
                f"{self.count}, {self.calls}, {self.repeats} and {self.tolerances}."
            )


class Data:
    """What the cases share, computed when the first of them needs it.

    Raises:
        ValueError: a mean distance that the clips are too short for.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.task = config, Restoration(config.task)
        self.fingerprint = self.task.fingerprint()
        self.groups = len(self.task.groups)
        if max(config.distances) > self.groups - 2 or min(config.distances) < 1:
            raise ValueError(
                f"The clips have {self.groups} frame groups: pass --distances between 1 and {self.groups - 2}, or more "
                "--task.frames."
            )

    @cached_property
    def samples(self) -> Any:
        return self.task.samples(self.config.count or 0, seed=4_000 + self.config.seed, films=[])

    @cached_property
    def backbone(self) -> Any:
        return self.task.warmed_up(self.fingerprint)

    @cached_property
    def pairs(self) -> Tensor:
        """[clips, i, j, ...]: every pairwise gradient at the decoder's input, on the CPU."""
        n = self.task.clips_at_once
        starts = track(range(0, len(self.samples), n), description="pairwise gradients", console=Console(stderr=True))
        parts = (self.samples[k : k + n] for k in starts)
        return torch.cat([self.task.latent_pairs(self.backbone, part, F.mse_loss).cpu() for part in parts])

    def of_parameters(self, terms: Callable[[Tensor], Tensor]) -> Tensor:
        """[clips, k, parameters]: the backbone's gradient from each of the terms [k, j, ...] of a clip's pairs."""
        clips = track(self.pairs, description="backbone", total=len(self.pairs), console=Console(stderr=True))
        rows = [
            self.task.parameter_gradients(self.backbone, self.samples.condition[k : k + 1], terms(pairs))
            for k, pairs in enumerate(clips)
        ]
        return torch.stack(rows)

    def interval(self, values: Sequence[float]) -> list[float]:
        return list(mean_interval(values, self.samples.sources))


def relative_error(got: Tensor, full: Tensor) -> float:
    return ((got - full).norm() / full.norm()).item()


def look_ahead(data: Data) -> dict[str, Any]:
    """Relative error at the decoder's input of every block and distance."""
    rows: list[dict[str, Any]] = []
    for memory in range(1, data.groups):
        for block in range(1, memory + 1):
            strategy = Chop(memory - block, block=block)
            errors = [relative_error(truncated(p, strategy.distance, block), p.sum(0)) for p in data.pairs]
            rows.append(
                {
                    "block": block,
                    "distance": strategy.distance,
                    "memory_groups": memory,
                    "relative_compute": relative_compute(strategy, data.groups),
                    "relative_error": data.interval(errors),
                    "errors": errors,
                }
            )
    found = {(r["block"], r["distance"]): r for r in rows}
    paper = [r for r in rows if r["block"] == 1 and r["distance"] > 0]
    lost = []  # per paper distance: the least that an equally large window loses
    for r in paper:
        others = [o for o in rows if o["memory_groups"] == r["memory_groups"] and o["block"] > 1]
        least = min(others, key=lambda o: o["relative_error"][0])
        lost.append(data.interval([b - a for a, b in zip(r["errors"], least["errors"], strict=True)]))
    cheaper: list[Any] = []  # per paper distance: the best block at no more compute and at most twice the memory
    for r in paper:
        room = 2 * r["memory_groups"]
        others = [o for o in rows if o["relative_compute"] <= r["relative_compute"] + 1e-9 and o["block"] > 1]
        others = [o for o in others if o["memory_groups"] <= room]
        if room < data.groups and others:
            best = min(others, key=lambda o: o["relative_error"][0])
            gain = data.interval([a - b for a, b in zip(r["errors"], best["errors"], strict=True)])
            cheaper.append((r, best, gain))
    same = [
        data.interval([b - a for a, b in zip(found[1, d]["errors"], r["errors"], strict=True)])
        for (w, d), r in found.items()
        if w > 1
    ]
    claims = [
        Claim(
            "At the same distance a look-ahead block is never less accurate than the paper's scheme (mean over clips).",
            "ours",
            _signs([[-x for x in (m, h, lo)] for m, lo, h in same], lenient=True),
            f"largest difference of the relative error over {len(same)} settings: {max(m for m, _, _ in same):.3f}",
        ),
        Claim(
            "At equal memory (W + D groups) the paper's W = 1 has the least error of all blocks.",
            "ours",
            _signs(lost),
            "; ".join(
                f"{r['memory_groups']} groups: {r['relative_error'][0]:.2f} at compute {r['relative_compute']:.2f}, "
                f"next best block {with_interval(x, 3)} worse"
                for r, x in list(zip(paper, lost, strict=True))[:3]
            ),
        ),
        Claim(
            "At equal compute and twice the memory a look-ahead block has less error than the paper's scheme.",
            "ours",
            _signs([g for _, _, g in cheaper]) if cheaper else "undecided",
            "; ".join(
                f"D={r['distance']} in {r['memory_groups']} groups {r['relative_error'][0]:.3f}, W={b['block']} "
                f"D={b['distance']} in {b['memory_groups']} groups {b['relative_error'][0]:.3f} at "
                f"{b['relative_compute'] / r['relative_compute']:.2f} of the compute"
                for r, b, _ in cheaper[:3]
            ),
        ),
    ]
    for r in rows:
        del r["errors"]
    return {"rows": rows, "claims": [asdict(c) for c in claims]}


def _signs(intervals: list[Any], lenient: bool = False) -> Verdict:
    """Holds if all intervals are above 0 (``lenient``: none is below); fails if one is below; else undecided."""
    if any(high < 0 for _, _, high in intervals):
        return "fails"
    return "holds" if lenient or all(low > 0 for _, low, _ in intervals) else "undecided"


def randomised(data: Data) -> dict[str, Any]:
    """Squared error of truncation and of its unbiased, random counterpart, at the latents and in the backbone."""
    latent = torch.stack([rt.gram(rt.distance_terms(p)) for p in data.pairs])
    terms = data.of_parameters(rt.distance_terms)
    parameter = torch.stack([rt.gram(t) for t in terms])
    counts = bootstrap_counts(data.samples.sources, 400, data.config.seed)
    full = terms.sum(1)
    rows: list[dict[str, Any]] = []
    for distance in data.config.distances:
        chopped = terms[:, : distance + 1].sum(1)
        row: dict[str, Any] = {"distance": distance, "relative_compute": relative_compute(Chop(distance), data.groups)}
        for place, grams in (("latents", latent), ("backbone", parameter)):
            norms = grams.sum((1, 2))
            tail = grams[:, distance + 1 :, distance + 1 :].sum((1, 2))
            # The tuned law sees other clips than those that it is judged on.
            tuned = rt.best_survival((grams[::2] / norms[::2, None, None]).mean(0), distance)
            laws = {"geometric": rt.geometric(distance, data.groups), "tuned": tuned}
            row[place] = {"truncated": data.interval((tail / norms).sqrt().tolist())}
            for name, law in laws.items():
                variances = torch.tensor([rt.randomised_variance(x, law) for x in grams], dtype=torch.float64)
                judged = slice(1, None, 2) if name == "tuned" else slice(None)
                values = (variances / norms)[judged].sqrt().tolist()
                row[place][name] = list(mean_interval(values, data.samples.sources[judged]))
                if place == "backbone":
                    row[place][f"mean_of_n_{name}"] = _crossing(chopped, full, variances, counts)
        rows.append(row)
    chunks = []
    for block in (2, 4):
        keep = 1 - 1 / block
        law = torch.tensor([keep**d for d in range(data.groups)], dtype=torch.float64)
        values = [(rt.randomised_variance(x, law) / x.sum().item()) ** 0.5 for x in latent]
        fixed = [relative_error(truncated(p, 0, block), p.sum(0)) for p in data.pairs]
        chunks.append({"block": block, "fixed": data.interval(fixed), "artbp": data.interval(values)})
    return {"rows": rows, "chunks": chunks, "claims": [asdict(c) for c in randomised_claims(rows, chunks)]}


def _crossing(chopped: Tensor, full: Tensor, variances: Tensor, counts: Tensor) -> dict[str, Any]:
    """Squared errors of the mean of n clips as estimates of the population's gradient, relative to its square.

    Truncated: bias^2 + data / n. Randomised: (data of the full gradient + draws) / n. They cross at
    n = (extra variance of one clip) / bias^2; kept as 1/n, which is finite and 0 where there is no bias.
    """
    products = {
        "square": mean_products(full, full, counts),
        "bias": mean_products(chopped - full, chopped - full, counts).clamp(min=0),
    }
    total = counts.sum(1)

    def data_variance(x: Tensor) -> Tensor:
        return counts @ x.double().square().sum(1) / total - mean_products(x, x, counts)

    extra = data_variance(full) - data_variance(chopped) + counts @ variances / total
    # A randomised estimate that has less variance than the truncated one wins from the first clip on: 1/n = 1.
    inverse = torch.where(extra > 0, (products["bias"] / extra.clamp(min=1e-300)).clamp(max=1.0), 1.0)
    low, high = torch.quantile(inverse[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    square = products["square"][0].item()
    found: dict[str, Any] = {"inverse_crossing": [inverse[0].item(), low, high], "relative": None}
    if square > 0:
        found["relative"] = {
            "bias": products["bias"][0].item() / square,
            "data_truncated": data_variance(chopped)[0].item() / square,
            "data_full": data_variance(full)[0].item() / square,
            "draws": variances.mean().item() / square,
        }
    return found


def randomised_claims(rows: list[dict[str, Any]], chunks: list[dict[str, Any]]) -> list[Claim]:
    """Is the unbiased truncation ever worth its variance?"""
    one = [
        (r["distance"], place, r[place]["truncated"], r[place]["tuned"])
        for r in rows
        for place in ("latents", "backbone")
    ]
    inverse = [r["backbone"]["mean_of_n_tuned"]["inverse_crossing"] for r in rows]
    threshold = [[x * AVERAGED - 1 for x in i] for i in inverse]

    def clips(inverse: float) -> str:
        return f"{1 / inverse:.0f}" if inverse > 0 else "infinitely many"

    return [
        Claim(
            "For one clip an unbiased randomised truncation has less error than the biased one at equal expected cost.",
            "ours",
            _signs([[t[0] - u[0], t[1] - u[2], t[2] - u[1]] for _, _, t, u in one]),
            "; ".join(
                f"{p} D={d}: truncated {with_interval(t, 2)}, randomised (tuned) {with_interval(u, 2)}"
                for d, p, t, u in one
            ),
        ),
        Claim(
            f"Averaged over as many clips as an update sees (at most {AVERAGED}) it is worth it: no bias, less error.",
            "ours",
            _signs(threshold),
            "clips at which the squared errors cross: "
            + "; ".join(
                f"D={r['distance']} {clips(i[0])} [{clips(i[2])}, {clips(i[1])}]" for r, i in zip(rows, inverse)
            ),
        ),
        Claim(
            "At cost and mean memory of plain chunks, ARTBP (Tallec and Ollivier 2017) has less error for one clip.",
            "ours",
            _signs([[f[0] - a[0], f[1] - a[2], f[2] - a[1]] for f, a in ((c["fixed"], c["artbp"]) for c in chunks)]),
            "; ".join(
                f"W={c['block']}: chunks {with_interval(c['fixed'], 2)}, ARTBP {with_interval(c['artbp'], 2)}"
                for c in chunks
            ),
        ),
    ]


def sampled(data: Data) -> dict[str, Any]:
    """Variance that sampled losses add to ``Chop(1)`` and to the exact gradient, and the time that they save."""
    counts = sorted({1, max(1, data.groups // 4), max(1, data.groups // 2), data.groups})
    rows: list[dict[str, Any]] = []
    for distance, strategy in ((1, Chop(1)), (data.groups - 1, Exact())):
        terms = data.of_parameters(partial(rt.loss_terms, distance=distance))
        own = terms.sum(1)
        everyone = torch.ones(1, len(own), dtype=torch.float64)
        between = (own.double().square().sum(1).mean() - mean_products(own, own, everyone)[0]).item()
        grams = [rt.gram(t) for t in terms]
        latent = [rt.gram(rt.loss_terms(p, distance)) for p in data.pairs]
        seconds = _times(data, strategy, counts)
        for k, n in enumerate(counts):
            variance = [rt.sampled_variance(x, n) for x in grams]
            added = [v / between for v in variance] if between > 0 else None
            ratio = mean_interval([row[k] / row[-1] for row in seconds])
            rows.append(
                {
                    "strategy": "Chop(1)" if distance == 1 else "Exact()",
                    "count": n,
                    "rmse_latents": data.interval(
                        [(rt.sampled_variance(x, n) / x.sum().item()) ** 0.5 for x in latent]
                    ),
                    "rmse_backbone": data.interval(
                        [(v / x.sum().item()) ** 0.5 for v, x in zip(variance, grams, strict=True)]
                    ),
                    "added_variance": None if added is None else data.interval(added),
                    "time_ratio": list(ratio),
                    # Variance of the gradient that a second buys, against all losses: below 1 sampling pays.
                    "variance_times_time": None
                    if added is None
                    else [(1 + a) * t for a, t in zip(data.interval(added), ratio, strict=True)],
                }
            )
    claims = []
    for name in ("Chop(1)", "Exact()"):
        part = [r for r in rows if r["strategy"] == name and r["count"] < data.groups]
        products = [r["variance_times_time"] for r in part]
        if not part or products[0] is None:
            continue
        best = min(part, key=lambda r: r["variance_times_time"][0])
        claims.append(
            Claim(
                f"Sampled losses pay with {name}: for some count, variance of the gradient x time is below that of all "
                "losses.",
                "ours",
                _signs([[1 - x for x in (b[0], b[2], b[1])] for b in [best["variance_times_time"]]]),
                "; ".join(
                    f"{r['count']} of {data.groups}: time {with_interval(r['time_ratio'], 2)}, variance "
                    f"{with_interval([1 + x for x in r['added_variance']], 2)}, product {with_interval(b, 2)}"
                    for r, b in zip(part, products, strict=True)
                ),
            )
        )
    return {"rows": rows, "claims": [asdict(c) for c in claims]}


def _times(data: Data, strategy: Chop | Exact, counts: list[int]) -> list[list[float]]:
    """Seconds [repeat][count], interleaved, the first round thrown away; on the CPU those of this process alone."""
    z, target = data.task.restore(None, data.samples.latents[:1]).requires_grad_(), data.samples.clean[:1]
    on_cuda = data.task.device.type == "cuda"

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize(data.task.device)
        return time.perf_counter() if on_cuda else time.process_time()

    mse = in_full_precision(F.mse_loss)
    rounds = []
    bar = track(range(1 + (data.config.repeats or 1)), description="timing", console=Console(stderr=True))
    torch.manual_seed(data.config.seed)
    for _ in bar:
        seconds = []
        for n in counts:
            one: Strategy = strategy if n == data.groups else Sampled(n, strategy)
            start = now()
            chopgrad.frame_loss(data.task.decoder, z, target, mse, one).backward()
            seconds.append(now() - start)
        rounds.append(seconds)
    return rounds[1:]


def adaptive(data: Data) -> dict[str, Any]:
    """Chosen distance, realised error and cost of ``Adaptive`` over a run of calls on changing clips."""
    rows: list[dict[str, Any]] = []
    for tolerance in data.config.tolerances:
        strategy = Adaptive(tolerance)
        calls: list[dict[str, Any]] = []
        bar = track(range(data.config.calls or 1), description=f"tolerance {tolerance}", console=Console(stderr=True))
        for call in bar:
            k = call % len(data.samples)
            pairs = data.pairs[k]
            with torch.no_grad():
                z = data.task.restore(data.backbone, data.samples.condition[k : k + 1])
            z.requires_grad_()
            forwards = _counted(data, z, k, strategy)
            assert z.grad is not None
            got = torch.stack([z.grad[0, :, g.latents] for g in data.task.groups]).float().cpu()
            if got.shape != pairs[0].shape[:1] + pairs.shape[2:]:
                raise ValueError("The adaptive case needs a VAE with as many latents in every group.")
            misfit = [relative_error(got, truncated(pairs, d)) for d in range(data.groups)]
            distance = min(range(data.groups), key=misfit.__getitem__)
            calls.append(
                {
                    "clip": data.samples.sources[k],
                    "distance": distance,
                    "realised_error": relative_error(got, pairs.sum(0)),
                    "forwards_per_group": forwards / data.groups,
                    "relative_compute": (forwards / data.groups + 2 * (1 + distance)) / 3,
                    "parity": misfit[distance],
                }
            )
        clips = [c["clip"] for c in calls]
        column = lambda name, calls=calls: [c[name] for c in calls]  # noqa: E731
        rows.append(
            {
                "tolerance": tolerance,
                "calls": calls,
                "distance": list(mean_interval(column("distance"), clips)),
                "realised_error": list(mean_interval(column("realised_error"), clips)),
                "kept": list(mean_interval([float(c["realised_error"] <= tolerance) for c in calls], clips)),
                "relative_compute": statistics.fmean(column("relative_compute")),
            }
        )
    claims = [
        Claim(
            "Adaptive (after Aicher, Foti, Fox 2019) keeps the relative error within its tolerance in over 90 % of "
            "the calls.",
            "ours",
            _signs([[x - 0.9 for x in r["kept"]] for r in rows]),
            "; ".join(
                f"{r['tolerance']}: kept in {100 * r['kept'][0]:.0f} %, error {with_interval(r['realised_error'], 2)}, "
                f"distance {r['distance'][0]:.1f}, compute {r['relative_compute']:.2f} of full"
                for r in rows
            ),
        )
    ]
    exact = relative_compute(Exact(), data.groups)
    dearest, cheapest = (f(r["relative_compute"] for r in rows) for f in (max, min))
    claims.append(
        Claim(
            "An adaptive distance with graphs kept (block of one) takes less compute than the exact gradient.",
            "ours",
            "holds" if dearest < exact else "fails" if cheapest > exact else "undecided",
            f"relative to full back-propagation, without the probes' backward passes: {cheapest:.2f} (tolerance "
            f"{max(r['tolerance'] for r in rows)}) to {dearest:.2f} (tolerance {min(r['tolerance'] for r in rows)}), "
            f"Exact() {exact:.2f}",
        )
    )
    return {"rows": rows, "claims": [asdict(c) for c in claims]}


def _counted(data: Data, z: Tensor, k: int, strategy: Adaptive) -> int:
    """Back-propagate the loss of clip k; returns the decoded groups, those of a probe included."""
    decoder, target, steps = data.task.decoder, data.samples.clean[k : k + 1], 0
    step = decoder.step

    def counting(latent: Tensor, state: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(latent, state)

    decoder.step = counting  # type: ignore[assignment, method-assign]
    try:
        chopgrad.frame_loss(decoder, z, target, in_full_precision(F.mse_loss), strategy).backward()
    finally:
        del decoder.step  # type: ignore[method-assign]
    return steps


MEASUREMENTS = {"look_ahead": look_ahead, "randomised": randomised, "sampled": sampled, "adaptive": adaptive}


def settings_of(config: Config, case: str, data: Data) -> dict[str, Any]:
    """Only what the case depends on, so that another case's setting does not undo it."""
    own = {"randomised": ("distances",), "sampled": ("repeats",), "adaptive": ("tolerances", "calls")}.get(case, ())
    kept = {k: getattr(config, k) for k in ("count", "seed", *own)}
    shared = {"case": case, "task": data.task.described(), "groups": data.groups, "inputs_sha256": data.fingerprint}
    return shared | {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def figure(records: dict[str, Record], path: Path) -> None:
    """One panel per case."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    panels = dict(zip(CASES, axes.flat, strict=True))
    for case, record in records.items():
        PANELS[case](panels[case], record)
    for case, axis in panels.items():
        axis.grid(alpha=0.3)
        if case in records:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        else:
            axis.set_axis_off()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _draw_look_ahead(axis: Any, record: Record) -> None:
    rows = record.metrics["rows"]
    for k, memory in enumerate((2, 3, 4, 6)):
        part = [r for r in rows if r["memory_groups"] == memory]
        x, y = [r["relative_compute"] for r in part], [r["relative_error"][0] for r in part]
        axis.plot(x, y, "-o", color=f"C{k}", markersize=4, label=f"W + D = {memory} groups")
    paper = [r for r in rows if r["block"] == 1 and r["memory_groups"] <= 6]
    axis.plot(
        [r["relative_compute"] for r in paper],
        [r["relative_error"][0] for r in paper],
        "k*",
        ms=9,
        label="W = 1 (paper)",
    )
    axis.set_xlabel("compute relative to full back-propagation")
    axis.set_ylabel("relative error at the decoder input")
    axis.set_title("look-ahead blocks at equal memory")


def _draw_randomised(axis: Any, record: Record) -> None:
    n = [2**k for k in range(13)]
    for k, row in enumerate(record.metrics["rows"]):
        parts = row["backbone"]["mean_of_n_tuned"]["relative"]
        if parts is None:
            continue
        color, d = f"C{k}", row["distance"]
        axis.plot(
            n,
            [(parts["bias"] + parts["data_truncated"] / m) ** 0.5 for m in n],
            color=color,
            label=f"truncated, D = {d}",
        )
        draws = [((parts["data_full"] + parts["draws"]) / m) ** 0.5 for m in n]
        axis.plot(n, draws, "--", color=color, label=f"randomised, mean distance {d}")
    axis.axvline(AVERAGED, color="k", linewidth=1, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("clips averaged over (dotted: what an update sees)")
    axis.set_ylabel("relative error of the backbone's mean gradient")
    axis.set_title("biased against unbiased truncation")


def _draw_sampled(axis: Any, record: Record) -> None:
    for k, name in enumerate(("Chop(1)", "Exact()")):
        rows = [r for r in record.metrics["rows"] if r["strategy"] == name]
        x = [r["count"] for r in rows]
        axis.plot(x, [r["time_ratio"][0] for r in rows], "-o", color=f"C{k}", markersize=4, label=f"time, {name}")
        if rows[0]["added_variance"] is not None:
            variance = [1 + r["added_variance"][0] for r in rows]
            axis.plot(x, variance, "--o", color=f"C{k}", markersize=4, label=f"variance, {name}")
            product = [r["variance_times_time"][0] for r in rows]
            axis.plot(x, product, ":o", color=f"C{k}", markersize=4, label=f"variance x time, {name}")
    axis.axhline(1, color="k", linewidth=1)
    axis.set_xlabel(f"losses drawn of {record.settings['groups']}")
    axis.set_ylabel("relative to all losses")
    axis.set_ylim(bottom=0)
    axis.set_title("sampled losses, gradient of the backbone")


def _draw_adaptive(axis: Any, record: Record) -> None:
    for k, row in enumerate(record.metrics["rows"]):
        errors = [c["realised_error"] for c in row["calls"]]
        label = f"tolerance {row['tolerance']}, mean D {row['distance'][0]:.1f}, compute {row['relative_compute']:.2f}"
        axis.plot(range(len(errors)), errors, "o", color=f"C{k}", markersize=4, label=label)
        axis.axhline(row["tolerance"], color=f"C{k}", linestyle="--", linewidth=1)
    axis.set_xlabel("call")
    axis.set_ylabel("realised relative error")
    axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
    axis.set_title("adaptive distance (dashed: tolerance)")


PANELS = {
    "look_ahead": _draw_look_ahead,
    "randomised": _draw_randomised,
    "sampled": _draw_sampled,
    "adaptive": _draw_adaptive,
}


def table(record: Record) -> str:
    """Markdown table of the look-ahead blocks at equal memory."""
    rows = [
        [r["memory_groups"], r["block"], r["distance"], r["relative_compute"], with_interval(r["relative_error"])]
        for r in record.metrics["rows"]
        if r["memory_groups"] <= 4
    ]
    return markdown_table(["memory (groups)", "block", "distance", "compute", "relative error"], rows)


def main(config: Config) -> None:
    config.check()
    assert config.out
    data = Data(config)
    records = {}
    for case in config.cases:
        path = config.out / f"estimators-{case}.json"
        records[case] = run_case(
            path, settings_of(config, case, data), partial(MEASUREMENTS[case], data), config.task.device
        )
        for claim in records[case].metrics["claims"]:
            print(f"- {claim['verdict']}: {claim['statement']} ({claim['evidence']})")
        figure(records, config.out / "estimators.png")
    if "look_ahead" in records:
        print(f"\n{table(records['look_ahead'])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
