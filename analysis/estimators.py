"""Other ways to spend the same compute than a fixed truncation distance: ``python analysis/estimators.py``.

Four alternatives to the paper's ``Chop(D)``, on latents that a restoring backbone made and that the trained decoder
decodes:

- look-ahead blocks: error against cost at equal memory (``Chop(D, block=W)`` holds W + D graphs);
- randomised truncation: unbiased, at the price of variance (``suite.random_truncation``). Its squared error against
  the biased truncation's at equal expected cost, for one clip and for the mean of n clips;
- sampled losses (``chopgrad.Sampled``): added variance against the variance of the data, and the time saved;
- adaptive distance (``analysis.estimation.distance_from_tolerance``): realised error against tolerance, and cost.

Variances are exact sums over all draws, not estimates from samples; intervals are over clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from analysis.estimation.adaptive import adaptive
from analysis.estimation.data import Data
from analysis.estimation.figure import figure, table
from analysis.estimation.look_ahead import look_ahead
from analysis.estimation.randomised import randomised
from analysis.estimation.sampled import sampled
from analysis.settings import OnSamples
from suite.cases import run_case
from suite.command_line import run_main
from suite.printing import print_claims

CASES = ("look_ahead", "randomised", "sampled", "adaptive")


@dataclass
class Config(OnSamples):
    """Settings of the comparison."""

    full: bool = False
    """The committed run: more clips and more repetitions."""
    count: int | None = None
    """Clips. None: 8, or 48 with --full."""
    cases: tuple[str, ...] = CASES
    distances: tuple[int, ...] = (1, 2, 4)
    """Mean distances of the randomised truncation: it costs on average what ``Chop`` of that distance costs."""
    tolerances: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Of the adaptive strategy."""
    calls: int | None = None
    """Calls of the adaptive strategy per tolerance. None: 6, or 20 with --full."""
    repeats: int | None = None
    """Interleaved timings of the sampled losses. None: 3, or 10 with --full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = self.count or (48 if self.full else 8)
        self.calls = self.calls or (20 if self.full else 6)
        self.repeats = self.repeats or (10 if self.full else 3)

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

    def data(self) -> Data:
        """Raises ValueError: a mean distance that the clips are too short for, or what ``Restoration`` raises."""
        assert self.count
        data = Data(self.task, self.count, self.seed)
        if max(self.distances) > data.groups - 2 or min(self.distances) < 1:
            raise ValueError(
                f"The clips have {data.groups} frame groups: pass --distances between 1 and {data.groups - 2}, or more "
                "--task.frames."
            )
        return data


def measurements(config: Config, data: Data) -> dict[str, Callable[[], dict[str, Any]]]:
    """What computes the metrics of each case."""
    assert config.calls and config.repeats
    return {
        "look_ahead": partial(look_ahead, data),
        "randomised": partial(randomised, data, config.distances),
        "sampled": partial(sampled, data, config.repeats),
        "adaptive": partial(adaptive, data, config.tolerances, config.calls),
    }


def settings_of(config: Config, case: str, data: Data) -> dict[str, Any]:
    """Only what the case depends on, so that another case's setting does not undo it."""
    own = {"randomised": ("distances",), "sampled": ("repeats",), "adaptive": ("tolerances", "calls")}.get(case, ())
    kept = {k: getattr(config, k) for k in ("count", "seed", *own)}
    shared = {"case": case, "task": data.task.described(), "groups": data.groups, "inputs_sha256": data.fingerprint}
    return shared | {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def main(config: Config) -> None:
    config.check()
    data = config.data()
    compute, records = measurements(config, data), {}
    for case in config.cases:
        path = config.folder / f"estimators-{case}.json"
        records[case] = run_case(path, settings_of(config, case, data), compute[case], config.task.device)
        print_claims([records[case]], bullets=True)
        figure(records, config.folder / "estimators.png")
    if "look_ahead" in records:
        print(f"\n{table(records['look_ahead'])}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
