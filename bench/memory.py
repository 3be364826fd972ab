"""Peak memory of one case, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.cases import FULL_SIZE, Case
from bench.estimates import seed_of_largest
from bench.subject import Subject
from chopgrad import Sampled
from chopgrad.memory import PeakMemory, available_bytes
from suite.history import changed
from suite.records import ROOT, read_record, write_record

# The server imports everything once, and each case runs in a fresh fork of it. Not on CUDA: importing diffusers asks
# for devices, and after that no fork may use them.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["bench.memory", "bench.predict", "bench.error"])
_SPAWNS = multiprocessing.get_context("spawn")
NO_MEMORY = (
    "out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory",
)  # fmt: skip
"""What PyTorch says for want of memory where it does not raise ``torch.OutOfMemoryError``: of pinned memory, say."""
NO_ENGINE = "unable to find an engine"
"""cuDNN says so for want of a workspace, and of an operator that it does not know."""
FULL = 0.05
"""A device with less than this share of its memory free had none left for a workspace."""
KILLED = (-9, 255)
"""Exit codes of a process, or of its server, that the kernel stopped because the host had no memory left."""

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
    """Metrics of an earlier run, if its settings, code, versions and device are the same.

    Of the embedded decoders on a CPU the same code is the same commit: all is measured again in ten minutes. A sweep on
    a GPU, or of full-size decoders, takes hours and is committed in parts, so there a commit that leaves the code alone
    undoes nothing.
    """
    try:
        old = read_record(path)
    except ValueError:
        return None
    same = all(old.provenance.get(k) == made_by[k] for k in ("dirty", "torch", "diffusers", "device"))
    if not same or made_by["dirty"] or old.settings != case.settings():
        return None
    commits = old.provenance.get("commit"), made_by["commit"]
    takes_hours = torch.device(case.device).type == "cuda" or case.vae in FULL_SIZE
    return old.metrics if commits[0] == commits[1] or (takes_hours and same_code(*commits)) else None


@lru_cache
def same_code(old: str | None, new: str | None) -> bool:
    """Whether nothing that is measured, or measures, differs between two commits in more than words."""
    if old is None or new is None:
        return False
    return changed(ROOT, old, new, ("chopgrad", "bench", "suite", "weights", "constraints.txt")) == frozenset()


def in_fresh_process(work: Work, case: Case) -> dict[str, Any]:
    """What ``work`` returns. Running out of memory is a result like any other: ``out_of_memory`` is then true."""
    processes: Any = _SPAWNS if torch.device(case.device).type == "cuda" else _FORKS
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_report, args=(work, case, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    if outcome is None:
        if process.exitcode in KILLED:
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
        **subject.chosen(),
    }


def is_out_of_memory(error: Exception) -> bool:
    """Of the device, or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if NO_ENGINE in str(error) and torch.cuda.is_available():
        # The tensors of the failed call are alive as long as its error is.
        total = torch.cuda.mem_get_info()[1]
        return (available_bytes("cuda") or 0) < FULL * total
    return any(words in str(error) for words in NO_MEMORY)


def _report(work: Work, case: Case, sender: Connection) -> None:
    if torch.device(case.device).type == "cpu":
        torch.set_num_threads(1)  # several cases are at work, one a core
    try:
        outcome: dict[str, Any] | str = work(case)
    except Exception as error:
        # What is no lack of memory is sent to the parent, which raises it.
        outcome = {"out_of_memory": True} if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    sender.send(outcome)
    sender.close()


def _resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
