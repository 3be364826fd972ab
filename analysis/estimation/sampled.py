"""Sampled losses: the variance that they add to a gradient, and the time that they save."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import chopgrad
from analysis.backbone.mean_gradient import mean_products
from analysis.backbone.restoration import in_full_precision
from analysis.estimation.data import Data
from chopgrad import Chop, Exact, Sampled, Strategy
from suite import random_truncation as rt
from suite.bootstrap import mean_interval
from suite.claims import Claim
from suite.progress import track
from suite.tables import with_interval
from suite.verdicts import above


def sampled(data: Data, repeats: int) -> dict[str, Any]:
    """Variance that sampled losses add to ``Chop(1)`` and to the exact gradient, and the time that they save."""
    counts = sorted({1, max(1, data.groups // 4), max(1, data.groups // 2), data.groups})
    rows: list[dict[str, Any]] = []
    for distance, strategy in ((1, Chop(1)), (data.groups - 1, Exact(offload=False))):
        terms = data.of_parameters(partial(rt.loss_terms, distance=distance))
        own = terms.sum(1)
        everyone = torch.ones(1, len(own), dtype=torch.float64)
        between = (own.double().square().sum(1).mean() - mean_products(own, own, everyone)[0]).item()
        grams = [rt.gram(t) for t in terms]
        latent = [rt.gram(rt.loss_terms(p, distance)) for p in data.pairs]
        seconds = _times(data, strategy, counts, repeats)
        for k, n in enumerate(counts):
            variance = [rt.sampled_variance(x, n) for x in grams]
            added = [v / between for v in variance] if between > 0 else None
            ratio = mean_interval([row[k] / row[-1] for row in seconds])
            rows.append(
                {
                    "strategy": "Chop(1)" if distance == 1 else "Exact(offload=False)",
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
    for name in ("Chop(1)", "Exact(offload=False)"):
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
                above([[1 - x for x in (b[0], b[2], b[1])] for b in [best["variance_times_time"]]]),
                "; ".join(
                    f"{r['count']} of {data.groups}: time {with_interval(r['time_ratio'], 2)}, variance "
                    f"{with_interval([1 + x for x in r['added_variance']], 2)}, product {with_interval(b, 2)}"
                    for r, b in zip(part, products, strict=True)
                ),
            )
        )
    return {"rows": rows, "claims": [asdict(c) for c in claims]}


def _times(data: Data, strategy: Chop | Exact, counts: list[int], repeats: int) -> list[list[float]]:
    """Seconds [repeat][count], interleaved, the first round thrown away; on the CPU those of this process alone."""
    z, target = data.task.restore(None, data.samples.latents[:1]).requires_grad_(), data.samples.clean[:1]
    on_cuda = data.task.device.type == "cuda"

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize(data.task.device)
        return time.perf_counter() if on_cuda else time.process_time()

    mse = in_full_precision(F.mse_loss)
    rounds = []
    bar = track(range(1 + repeats), description="timing")
    torch.manual_seed(data.seed)
    for _ in bar:
        seconds = []
        for n in counts:
            one: Strategy = strategy if n == data.groups else Sampled(n, strategy)
            start = now()
            chopgrad.frame_loss(data.task.decoder, z, target, mse, one).backward()
            seconds.append(now() - start)
        rounds.append(seconds)
    return rounds[1:]
