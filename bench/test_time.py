"""Time of every strategy, by pytest-benchmark. ``python -m bench`` runs this file and reads the records it writes.

Machines are noisy, so each round times full back-propagation right before the strategy, and the ratio of the two is
the result. Nothing is timed before the gradients of its VAE have been checked.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.cases import Case, Subject, cases, label, strategies
from bench.memory import finished
from chopgrad import Chop, Exact, Full, Strategy
from suite.bootstrap import mean_interval
from suite.pairwise import pairwise_gradients, truncated
from suite.records import provenance, write_record

DEVICE = os.environ.get("CHOPGRAD_BENCH_DEVICE", "cpu")
ROUNDS = int(os.environ.get("CHOPGRAD_BENCH_ROUNDS", "3"))
RESULTS = Path(os.environ.get("CHOPGRAD_BENCH_RESULTS", "results"))
CASES = cases(DEVICE, full=os.environ.get("CHOPGRAD_BENCH_FULL") == "1")
PARITY = 1e-3
"""Largest relative difference of float32 gradients that rounding may explain."""


class Laboratory:
    """The video last made ready, shared by the cases that follow each other, and what was checked."""

    def __init__(self) -> None:
        self.made_by = provenance(DEVICE)
        self.made_by["command"] = os.environ.get("CHOPGRAD_BENCH_COMMAND", self.made_by["command"])
        self.checked: set[str] = set()
        self.subject: Subject | None = None
        self.reference: Strategy = Full()

    def prepare(self, case: Case) -> Subject:
        if case.vae not in self.checked:
            self.subject = None
            check_gradients(case)
            self.checked.add(case.vae)
        if self.subject is None or replace(self.subject.case, strategy=case.strategy) != case:
            self.subject = None  # before the next one is built
            self.subject = Subject(case)
            self.reference = Full() if fits(self.subject, Full()) else Exact()
        return self.subject


def fits(subject: Subject, strategy: Strategy) -> bool:
    try:
        subject.run(strategy)
    except torch.OutOfMemoryError:
        return False
    return True


def check_gradients(case: Case) -> None:
    """Every strategy against the pairwise gradients of one plain graph, on a small video.

    Raises:
        AssertionError: one differs by more than rounding; names it.
    """
    subject = Subject(
        replace(case, frames=17, height=64, width=64, dtype="float32", loss="mse", trainable_decoder=False)
    )
    (pairs,) = pairwise_gradients(subject.decoder, subject.latents, subject.target.to(DEVICE), [subject.loss_fn])
    groups = subject.decoder.frame_groups(subject.latents.shape[2])
    for strategy in strategies(DEVICE):
        distance, block = (strategy.distance, strategy.block) if isinstance(strategy, Chop) else (len(groups), 1)
        _, gradient = subject.run(strategy)
        expected = torch.zeros_like(gradient)
        for part, group in zip(truncated(pairs, distance, block), groups, strict=True):
            expected[:, :, group.latents] = part[:, :, : group.latents.stop - group.latents.start]
        error = ((gradient - expected).norm() / expected.norm()).item()
        assert error < PARITY, f"{case.vae}, {label(strategy)}: gradient differs by {error:.1e}; nothing is timed."


@pytest.fixture(scope="module")
def laboratory() -> Laboratory:
    return Laboratory()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_time(case: Case, laboratory: Laboratory, benchmark) -> None:
    path = RESULTS / "time" / f"{case.name}.json"
    if finished(path, case, laboratory.made_by):
        pytest.skip("measured before, with the same code on the same device")
    subject = laboratory.prepare(case)
    references: list[float] = []
    times: list[float] = []
    try:
        subject.run(case.strategy)
        benchmark.pedantic(
            lambda: times.append(seconds(subject, case.strategy)),
            setup=lambda: references.append(seconds(subject, laboratory.reference)),
            rounds=ROUNDS,
        )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        write_record(path, case.settings(), {"out_of_memory": True}, laboratory.made_by)
        pytest.skip("out of memory: recorded as such")
    ratios = [a / b for a, b in zip(times, references, strict=True)]
    metrics = {
        "out_of_memory": False,
        "seconds_median": median(times),
        "seconds": times,
        "reference": label(laboratory.reference),
        "reference_seconds": references,
        "ratio_to_reference": list(mean_interval(ratios)),
        "rounds": ROUNDS,
    }
    benchmark.extra_info |= {"ratio_to_reference": metrics["ratio_to_reference"], "reference": metrics["reference"]}
    write_record(path, case.settings(), metrics, laboratory.made_by)


def seconds(subject: Subject, strategy: Strategy) -> float:
    on_cuda = subject.latents.is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    subject.run(strategy)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
