"""The paper's statements on the backbone's gradient (Fig. 4), judged on the measures of one case."""

from __future__ import annotations

from typing import Any

from suite.claims import Claim, Verdict
from suite.tables import with_interval
from suite.verdicts import above, below

LARGE_ERROR, HIGH_COSINE = 0.2, 0.9
"""What "large" and "high" are taken to mean in the paper's words on Fig. 4, which gives no numbers."""


def claims(metrics: dict[str, Any]) -> list[Claim]:
    """The paper's statements on Fig. 4, and whether averaging helps, judged on this case's numbers."""
    rows = {(r["block"], r["distance"]): r for r in metrics["rows"]}
    if (1, 1) not in rows:
        return []
    zero, one = rows[1, 0], rows[1, 1]
    at = lambda name, digits=2: ", ".join(f"D={r['distance']} {with_interval(r[name], digits)}" for r in (zero, one))  # noqa: E731
    single, most = metrics["by_clips"][0]["1/1"], metrics["by_clips"][-1]
    target = _target(metrics.get("pixel_mse", {}))
    limit = one["limit_relative_error"]
    found = [
        Claim(
            f"At small distances the error of the backbone's gradient is large (normalised MAE over {LARGE_ERROR} at "
            "D = 0 and 1).",
            "Fig. 4",
            above([zero["normalised_mae"], one["normalised_mae"]], LARGE_ERROR),
            at("normalised_mae") + target,
        ),
        Claim(
            f"Yet its cosine with the full gradient is high (over {HIGH_COSINE} at D = 0 and 1).",
            "Fig. 4",
            above([zero["cosine"], one["cosine"]], HIGH_COSINE),
            at("cosine", 3) + target,
        ),
        Claim(
            "The error is one of magnitude: one scale for the whole gradient removes over half of the squared error.",
            "Sec. 3.3",
            _magnitude(zero["removed_by_one_scale"], one["removed_by_one_scale"]),
            "share removed by one scale "
            + at("removed_by_one_scale")
            + "; by one scale per tensor "
            + at("removed_by_tensor_scales")
            + target,
        ),
        Claim(
            "The optimiser rescales the error away: Adam's update has less than half of the gradient's normalised MAE.",
            "Sec. 3.3",
            below([[a / r["normalised_mae"][0] for a in r["adam_own_normalised_mae"]] for r in (zero, one)], 0.5),
            f"normalised MAE of the update {at('adam_own_normalised_mae')}, of the gradient {at('normalised_mae')}; "
            f"cosine of the update {at('adam_own_cosine')}{target}",
        ),
        Claim(
            "Averaging over data removes the truncation error (at D = 1 its limit is below half of one clip's error).",
            "ours",
            "undecided" if limit is None else below([[x / single["relative_error"] for x in limit]], 0.5),
            f"relative error of one clip {single['relative_error']:.2f}, of the mean of {most['clips']} "
            f"{most['1/1']['relative_error']:.2f}, limit {'undefined' if limit is None else with_interval(limit, 2)}; "
            f"noise of the full gradient's mean of {most['clips']}: {most['noise']:.2f}{target}",
        ),
    ]
    return found


def _target(pixel_mse: dict[str, list[float]]) -> str:
    """What the loss compares with, and how much of its residual the decoder could not draw whatever the latents."""
    if "floor" not in pixel_mse:  # an earlier record
        return "; target: the film"
    share = pixel_mse["floor"][0] / pixel_mse["restored"][0]
    return (
        f"; target: the film, the floor {100 * share:.0f} % of the residual"
        if share > 1e-6
        else "; target: the decoder's own"
    )


def _magnitude(zero: list[float], one: list[float]) -> Verdict:
    """With correction: of D = 0 only."""
    at_zero, at_one = above([zero], 0.5), above([one], 0.5)
    return at_zero if at_zero == at_one else "holds with correction" if at_zero == "holds" else at_one
