"""Randomised truncation against the truncated gradient, for one clip and for the mean of many.

The estimators and their exact variances are those of ``suite.random_truncation``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from analysis.backbone.mean_gradient import bootstrap_counts, mean_products
from analysis.estimation.data import Data, relative_error
from chopgrad import Chop
from chopgrad.planner import relative_compute
from suite import random_truncation as rt
from suite.bootstrap import mean_interval
from suite.claims import Claim
from suite.pairwise import truncated
from suite.tables import with_interval
from suite.verdicts import above

AVERAGED = 80
"""Clips that one update may be worth of: batches of 8 and Adam's memory of ten steps."""


def randomised(data: Data, distances: tuple[int, ...]) -> dict[str, Any]:
    """Squared error of truncation and of its unbiased, random counterpart, at the latents and in the backbone."""
    latent = torch.stack([rt.gram(rt.distance_terms(p)) for p in data.pairs])
    terms = data.of_parameters(rt.distance_terms)
    parameter = torch.stack([rt.gram(t) for t in terms])
    counts = bootstrap_counts(data.samples.sources, 400, data.seed)
    full = terms.sum(1)
    rows: list[dict[str, Any]] = []
    for distance in distances:
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
                    row[place][f"mean_of_n_{name}"] = crossing(chopped, full, variances, counts)
        rows.append(row)
    chunks = []
    for block in (2, 4):
        keep = 1 - 1 / block
        law = torch.tensor([keep**d for d in range(data.groups)], dtype=torch.float64)
        values = [(rt.randomised_variance(x, law) / x.sum().item()) ** 0.5 for x in latent]
        fixed = [relative_error(truncated(p, 0, block), p.sum(0)) for p in data.pairs]
        chunks.append({"block": block, "fixed": data.interval(fixed), "artbp": data.interval(values)})
    return {"rows": rows, "chunks": chunks, "claims": [asdict(c) for c in randomised_claims(rows, chunks)]}


def crossing(chopped: Tensor, full: Tensor, variances: Tensor, counts: Tensor) -> dict[str, Any]:
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
            above([[t[0] - u[0], t[1] - u[2], t[2] - u[1]] for _, _, t, u in one]),
            "; ".join(
                f"{p} D={d}: truncated {with_interval(t, 2)}, randomised (tuned) {with_interval(u, 2)}"
                for d, p, t, u in one
            ),
        ),
        Claim(
            f"Averaged over as many clips as an update sees (at most {AVERAGED}) it is worth it: no bias, less error.",
            "ours",
            above(threshold),
            "clips at which the squared errors cross: "
            + "; ".join(
                f"D={r['distance']} {clips(i[0])} [{clips(i[2])}, {clips(i[1])}]" for r, i in zip(rows, inverse)
            ),
        ),
        Claim(
            "At cost and mean memory of plain chunks, ARTBP (Tallec and Ollivier 2017) has less error for one clip.",
            "ours",
            above([[f[0] - a[0], f[1] - a[2], f[2] - a[1]] for f, a in ((c["fixed"], c["artbp"]) for c in chunks)]),
            "; ".join(
                f"W={c['block']}: chunks {with_interval(c['fixed'], 2)}, ARTBP {with_interval(c['artbp'], 2)}"
                for c in chunks
            ),
        ),
    ]
