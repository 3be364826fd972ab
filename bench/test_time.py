"""Time of every strategy, by pytest-benchmark. ``python -m bench`` runs this file and reads the records it writes.

Machines are noisy, so each round times full back-propagation right before the strategy, and the ratio of the two is
the result. Nothing is timed before the gradients of its VAE have been checked.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.baselines import Baseline
from bench.cases import ESTIMATES, STRATEGIES, Case, Method, label, measurable, plain, window
from bench.memory import finished, is_out_of_memory
from bench.selection import Selection, is_timed, stages
from bench.subject import Subject
from chopgrad import Exact, Full, Sampled, Strategy
from suite.bootstrap import mean_interval
from suite.pairwise import pairwise_gradients, truncated
from suite.records import provenance, write_record

SELECTION = Selection.from_json(os.environ.get("CHOPGRAD_BENCH_SELECTION", "{}"))
STAGE = int(os.environ.get("CHOPGRAD_BENCH_STAGE", "0"))
ROUNDS = int(os.environ.get("CHOPGRAD_BENCH_ROUNDS", "3"))
RESULTS = Path(os.environ.get("CHOPGRAD_BENCH_RESULTS", "results"))
DEADLINE = float(os.environ.get("CHOPGRAD_BENCH_DEADLINE", "inf"))
CASES = sorted(
    (c for c in stages(SELECTION)[STAGE] if is_timed(c) and measurable(c)),
    key=lambda c: (c.vae, c.loss, c.frames, c.height),  # the video made ready serves all its cases
)
REFERENCES: tuple[Strategy, ...] = (Full(), Exact(offload=False), Exact(offload=True), Exact(offload=True, pieces=True))
"""What times are compared with: the first that fits."""
PARITY = 1e-3
"""Largest relative difference of float32 gradients that rounding may explain."""


class Laboratory:
    """The video last made ready, shared by the cases that follow each other, and what was checked."""

    def __init__(self) -> None:
        self.made_by = provenance(SELECTION.device)
        self.made_by["command"] = os.environ.get("CHOPGRAD_BENCH_COMMAND", self.made_by["command"])
        self.checked = set(filter(None, os.environ.get("CHOPGRAD_BENCH_CHECKED", "").split(",")))
        """VAEs; an earlier stage of the same run may have checked some."""
        self.subject: Subject | None = None
        self.reference: Strategy | None = None

    def prepare(self, case: Case) -> Subject:
        if case.vae not in self.checked:
            self.subject = None
            check_gradients(case)
            self.checked.add(case.vae)
        if self.subject is None or self.subject.case.video != case.video:
            self.subject = None  # before the next one is built
            self.subject = Subject(case)
            self.reference = next((r for r in REFERENCES if fits(self.subject, r)), None)
        return self.subject


def fits(subject: Subject, method: Method) -> bool:
    try:
        subject.run(method)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The traceback holds the tensors, so the caches are emptied after it is gone.
    else:
        return True
    empty_caches()
    return False


def empty_caches() -> None:
    """Give back what PyTorch keeps of the device, and of pinned host memory, which other cases need in other sizes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def check_gradients(case: Case) -> None:
    """Every strategy against the pairwise gradients of one plain graph, on a small video.

    Raises:
        AssertionError: one differs by more than rounding; names it.
    """
    subject = Subject(
        replace(case, frames=17, height=16, width=16, dtype="float32", loss="mse", trainable_decoder=False)
    )
    target = subject.target.to(case.device)
    (pairs,) = pairwise_gradients(subject.decoder, subject.latents, target, [subject.loss_fn])
    groups = subject.decoder.frame_groups(subject.latents.shape[2])
    # One loss instead of two, so that something is left out of a short video.
    strategies: tuple[Method, ...] = (
        *STRATEGIES,
        *(Sampled(1, s.strategy) for s in ESTIMATES),
        Sampled(1, Exact(offload=False)),
    )
    if SELECTION.published:  # a small video of a full-size decoder takes seconds, so no more than what is timed
        strategies = tuple(dict.fromkeys(c.strategy for c in CASES if c.vae == case.vae))
    for strategy in strategies:
        if not measurable(replace(case, strategy=strategy)):
            continue
        inner = plain(strategy)
        assert not isinstance(inner, Baseline)
        torch.manual_seed(0)
        weights = inner.weights([1.0] * len(groups)) if isinstance(inner, Sampled) else None
        torch.manual_seed(0)  # the same draw
        gradient = subject.run(strategy)[1]
        expected = torch.zeros_like(gradient)
        for part, group in zip(truncated(pairs, *window(inner, len(groups)), weights), groups, strict=True):
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
    missing = [c for c in (case, case.video) if not (RESULTS / "memory" / f"{c.name}.json").exists()]
    if SELECTION.published and missing:  # it would take this process, and its results, with it
        pytest.skip(f"its peak is not known to fit: {', '.join(c.name for c in missing)}")
    if time.time() > DEADLINE:
        pytest.skip("no time is left: run it again to go on")
    memory = finished(RESULTS / "memory" / f"{case.name}.json", case, laboratory.made_by)
    # What ran out of host memory in its own process would take this one with it.
    metrics = None if memory and memory["out_of_memory"] else measure(case, laboratory, benchmark)
    write_record(path, case.settings(), metrics or {"out_of_memory": True}, laboratory.made_by)
    if metrics is None:
        pytest.skip("out of memory: recorded as such")
    benchmark.extra_info |= {"ratio_to_reference": metrics["ratio_to_reference"], "reference": metrics["reference"]}


def measure(case: Case, laboratory: Laboratory, benchmark) -> dict | None:
    """Times of the case and of the reference in alternation; None when one of them runs out of memory."""
    subject = laboratory.prepare(case)
    reference = laboratory.reference
    if subject.latents.is_cuda:  # where memory runs out, and where the first run compiles and tunes kernels
        empty_caches()
        if reference is None or not fits(subject, case.strategy):
            return None
    assert reference is not None
    references: list[float] = []
    times: list[float] = []
    try:
        benchmark.pedantic(
            lambda: times.append(seconds(subject, case.strategy)),
            setup=lambda: references.append(seconds(subject, reference)),
            rounds=ROUNDS,
        )
    except Exception as error:  # fragments of one may leave no room for the other
        if not is_out_of_memory(error):
            raise
        return None
    return {
        "out_of_memory": False,
        "seconds_median": median(times),
        "seconds": times,
        "reference": label(reference),
        "reference_seconds": references,
        "ratio_to_reference": list(mean_interval([a / b for a, b in zip(times, references, strict=True)])),
        "rounds": ROUNDS,
        **subject.chosen(),
    }


def seconds(subject: Subject, method: Method) -> float:
    device = subject.latents.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    subject.run(method)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
