"""What a strategy computes: forward and backward passes of the decoder, as a ratio to full back-propagation."""

from __future__ import annotations

from chopgrad.planner.peaks import FramesLoss
from chopgrad.strategies import Strategy


def relative_compute(strategy: Strategy, groups: int, frames_loss: FramesLoss = "streamed") -> float:
    """(forwards + 2 backwards) / 3 per group, by the table in ``chopgrad.strategies``."""
    settings = strategy.plan()
    block = min(settings.block or groups, groups)
    visits = 1 + min(settings.distance, groups - 1) / block  # reverse visits of a group
    forwards = 1.0
    # ``decode`` keeps states for one block of all groups; for others its backward pass decodes the video once more.
    streams = frames_loss == "streamed" or settings.block is not None
    if frames_loss == "whole" and settings.block is not None:
        forwards += 1
    if settings.recompute:
        # A visit rebuilds the graph; by pieces it first runs forward to have their inputs. Where groups stream by, the
        # last one of a window is visited at once, which saves one of its passes.
        forwards += (2 if settings.pieces else 1) * visits - (1 / block if streams else 0)
        forwards += 1 - 1 / (settings.every or 1)
    return (forwards + 2 * visits) / 3


def once_more(strategy: Strategy, groups: int) -> float:
    """What one more forward pass in every backward pass adds to ``relative_compute``; pieces are not recomputed."""
    settings = strategy.plan()
    block = min(settings.block or groups, groups)
    return 0.0 if settings.pieces else (1 + min(settings.distance, groups - 1) / block) / 3
