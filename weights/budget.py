"""The time that a call may take: it ends on time, and orderly when it is told to end."""

from __future__ import annotations

import signal
import threading
from collections import deque
from statistics import fmean
from time import monotonic
from types import FrameType
from typing import Any, Self

SAVING = 2.0
"""Seconds for a checkpoint before one was written."""
EXPORT = 5.0
"""Seconds to write the finished model, besides its latents' statistics, which take less than so many steps:"""
EXPORT_STEPS = 16
PACE_STEPS = 20
"""Last steps by which a run's pace is judged."""


class Budget:
    """Seconds from now on; within a ``with`` block a first Ctrl-C or SIGTERM uses them up, a second one is as usual.

    Args:
        minutes: None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = float("inf") if minutes is None else monotonic() + 60 * minutes
        self._steps: deque[float] = deque(maxlen=PACE_STEPS)
        self._saving = SAVING
        self.signal: int | None = None
        """What told the call to end."""

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {n: signal.signal(n, self._told) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()

    def took(self, step: float | None = None, saving: float | None = None) -> None:
        """Seconds that a step took, or a checkpoint."""
        if step is not None:
            self._steps.append(step)
        if saving is not None:
            self._saving = max(self._saving, saving)

    @property
    def pace(self) -> float:
        """Seconds of a step, the mean of the last PACE_STEPS; 0 before so many were taken."""
        return fmean(self._steps) if len(self._steps) == PACE_STEPS else 0.0

    def left(self, reserve: float = 0.0) -> float:
        """Seconds, besides a checkpoint's and those in reserve."""
        return 0.0 if self.signal else self._end - monotonic() - self._saving - reserve

    def allows_step(self) -> bool:
        """Also where it takes twice as long as the slowest of late."""
        return self.left() > 2 * max(self._steps, default=0.0)

    def allows_export(self) -> bool:
        return self.left(self.export) > 0

    @property
    def export(self) -> float:
        """Seconds that writing the finished model takes at most, so far as the steps tell."""
        return EXPORT + EXPORT_STEPS * self.pace
