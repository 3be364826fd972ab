"""Peak memory of one case, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.estimates import seed_of_largest
from bench.subject import Subject
from chopgrad import Sampled
from chopgrad.memory import PeakMemory
from suite.records import read_record, write_record

# The server imports everything once; each case runs in a fresh fork of it, in which CUDA was never initialised.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["bench.memory", "bench.predict", "bench.error"])

Work = Callable[[Case], dict[str, Any]]


def keep(work: Work, case: Case, folder: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a case: from a fresh process, or from the record of an earlier run of the same code on this device.

    Raises:
        RuntimeError: the process of the case failed for another reason than memory, with that reason.
    """
    path = folder / f"{case.name}.json"
    metrics = finished(path, case, made_by)
    if metrics is None:
        metrics = in_fresh_process(work, case)
        write_record(path, case.settings(), metrics, made_by)
    return metrics


def finished(path: Path, case: Case, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Metrics of an earlier run, if its settings, code, versions and device are the same."""
    try:
        old = read_record(path)
    except ValueError:
        return None
    same = all(old.provenance.get(k) == made_by[k] for k in ("commit", "dirty", "torch", "diffusers", "device"))
    return old.metrics if same and not made_by["dirty"] and old.settings == case.settings() else None


def in_fresh_process(work: Work, case: Case) -> dict[str, Any]:
    """What ``work`` returns. Running out of memory is a result like any other: ``out_of_memory`` is then true."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_report, args=(work, case, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    if outcome is None:
        if process.exitcode == -9:  # the kernel's answer when the host has no memory left
            return {"out_of_memory": True}
        raise RuntimeError(f"{case.name}: the measuring process ended with exit code {process.exitcode}.")
    if isinstance(outcome, str):
        raise RuntimeError(f"{case.name}: {outcome}")
    return outcome


def peak(case: Case) -> dict[str, Any]:
    """``peak_bytes`` is what the loss and its backward pass add to weights, latents and target.

    Of an estimate: in the draw that needs most.
    """
    subject = Subject(case)
    if isinstance(case.strategy, Sampled):
        torch.manual_seed(seed_of_largest(case.strategy, len(subject.decoder.frame_groups(subject.latents.shape[2]))))
    resident = _resident_bytes()
    with PeakMemory(case.device) as memory:
        loss, gradient = subject.run()
    return {
        "out_of_memory": False,
        "peak_bytes": memory.peak_bytes,
        "weights_bytes": sum(p.nbytes for p in subject.decoder.parameters()),
        "latents_bytes": subject.latents.nbytes,
        # The high-water mark of the process is only as fine as its allocator; it is there as a check.
        "resident_growth_bytes": max(0, _resident_bytes() - resident),
        "loss": loss.item(),
        "gradient_norm": gradient.float().norm().item(),
    }


def _report(work: Work, case: Case, sender: Connection) -> None:
    if torch.device(case.device).type == "cpu":
        torch.set_num_threads(1)  # several cases are at work, one a core
    try:
        outcome: dict[str, Any] | str = work(case)
    except torch.OutOfMemoryError:
        outcome = {"out_of_memory": True}
    except Exception as error:  # sent to the parent, which raises it
        outcome = f"{type(error).__name__}: {error}"
    sender.send(outcome)
    sender.close()


def _resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
