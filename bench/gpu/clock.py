"""A binding budget of time: what would not end in time is not begun, and what does not end is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bench.baselines import Baseline, SavedOnCpu
from bench.cases import Method, plain, uses_host
from chopgrad import Chop


class OutOfTime(Exception):
    """The time of a case is over."""


class Clock:
    """Counts down from so many seconds, and learns what a case takes.

    Args:
        seconds: from now on.
        pinning: GiB of host memory that are pinned in a second.
    """

    TIMES_FULL = 2.5
    """What a method may take of the time of full back-propagation, three forward passes, before one was measured."""
    TIMES_FULL_ON_HOST = 12.0
    """The same where all that a window's graphs save goes over the bus."""
    HOST_GIB = 1.3
    """Host memory of the states of a megapixel of video, in GiB (Wan 2.1 at 480x832, bfloat16; others take less)."""

    def __init__(self, seconds: float, pinning: float = 1.5) -> None:
        self._end = time.monotonic() + seconds
        self.pinning = pinning
        self._forward: dict[str, float] = {}
        self._rates: dict[tuple[str, Method], float] = {}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def estimate(self, vae: str, megapixels: float, calls: int, method: Method) -> float:
        """Seconds that a case will take."""
        pinned = self.host_gib(megapixels, method) / self.pinning
        full = 3 * self._forward.get(vae, 0.1)
        times = self.TIMES_FULL_ON_HOST if saves_on_host(method) else self.TIMES_FULL
        return 2 + pinned + calls * megapixels * self._rates.get((vae, method), times * full)

    def host_gib(self, megapixels: float, method: Method) -> float:
        """Host memory that a method will pin."""
        if not uses_host(method):
            return 0.0
        inner = plain(method)
        every = None if isinstance(inner, Baseline) else inner.plan().every
        # Every k-th state, and those between two of them, which are few in a long video.
        return self.HOST_GIB * megapixels / (every or 1) * (1 if every in (None, 1) else 1.3)

    def learn_forward(self, vae: str, megapixels: float, seconds: float) -> None:
        """The forward pass took so long."""
        self._forward[vae] = seconds / megapixels

    def learn(self, vae: str, megapixels: float, method: Method, seconds: float) -> None:
        """One call took so long: the slowest of a method is what is expected of its next."""
        key = vae, method
        self._rates[key] = max(self._rates.get(key, 0.0), seconds / megapixels)


def saves_on_host(method: Method) -> bool:
    """Whether what graphs save waits on the host, and not states alone."""
    inner = plain(method)
    return isinstance(inner, SavedOnCpu) or (isinstance(inner, Chop) and inner.offload)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop the block by ``OutOfTime`` when its time is over; one operator that hangs is not stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: raised inside a finalizer it would only be printed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
