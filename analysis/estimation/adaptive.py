"""The adaptive distance: realised error against its tolerance, and its cost."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.backbone.restoration import in_full_precision
from analysis.estimation.data import Data, relative_error
from analysis.estimation.distance_from_tolerance import Adaptive
from chopgrad import Exact
from chopgrad.planner import relative_compute
from suite.bootstrap import mean_interval
from suite.claims import Claim
from suite.pairwise import truncated
from suite.progress import track
from suite.tables import with_interval
from suite.verdicts import above


def adaptive(data: Data, tolerances: tuple[float, ...], calls_per_tolerance: int) -> dict[str, Any]:
    """Chosen distance, realised error and cost of ``Adaptive`` over a run of calls on changing clips."""
    rows: list[dict[str, Any]] = []
    for tolerance in tolerances:
        strategy = Adaptive(tolerance)
        calls: list[dict[str, Any]] = []
        bar = track(range(calls_per_tolerance), description=f"tolerance {tolerance}")
        for call in bar:
            k = call % len(data.samples)
            pairs = data.pairs[k]
            with torch.no_grad():
                z = data.task.restore(data.backbone, data.samples.condition[k : k + 1])
            gradient, forwards = _counted(data, z, k, strategy)
            got = torch.stack([gradient[0, :, g.latents] for g in data.task.groups]).float().cpu()
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
            above([[x - 0.9 for x in r["kept"]] for r in rows]),
            "; ".join(
                f"{r['tolerance']}: kept in {100 * r['kept'][0]:.0f} %, error {with_interval(r['realised_error'], 2)}, "
                f"distance {r['distance'][0]:.1f}, compute {r['relative_compute']:.2f} of full"
                for r in rows
            ),
        )
    ]
    exact = relative_compute(Exact(offload=False), data.groups)
    dearest, cheapest = (f(r["relative_compute"] for r in rows) for f in (max, min))
    claims.append(
        Claim(
            "An adaptive distance with graphs kept (block of one) takes less compute than the exact gradient.",
            "ours",
            "holds" if dearest < exact else "fails" if cheapest > exact else "undecided",
            f"relative to full back-propagation, without the probes' backward passes: {cheapest:.2f} (tolerance "
            f"{max(r['tolerance'] for r in rows)}) to {dearest:.2f} (tolerance {min(r['tolerance'] for r in rows)}), "
            f"Exact(offload=False) {exact:.2f}",
        )
    )
    return {"rows": rows, "claims": [asdict(c) for c in claims]}


def _counted(data: Data, z: Tensor, k: int, strategy: Adaptive) -> tuple[Tensor, int]:
    """The gradient of the loss of clip k, and how many groups were decoded for it, those of a probe included."""
    decoder, target, steps = data.task.decoder, data.samples.clean[k : k + 1], 0
    step = decoder.step

    def counting(latent: Tensor, state: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(latent, state)

    decoder.step = counting  # type: ignore[assignment, method-assign]
    try:
        _, gradient = strategy.loss_gradient(decoder, z, target, in_full_precision(F.mse_loss))
    finally:
        del decoder.step  # type: ignore[method-assign]
    return gradient, steps
