"""Peak memory of a case as the planner predicts it, on tensors that have shapes and no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.baselines import Baseline
from bench.cases import ARCHITECTURE, FULL_SIZE, Case, Inside, Whole, plain
from bench.memory import finished, in_fresh_process
from bench.subject import Subject
from chopgrad import Sampled
from chopgrad.decoders import Checkpoint
from chopgrad.memory import PeakMemory
from chopgrad.planner import FramesLoss, plan
from chopgrad.shapes import ShapesOnly
from suite.records import read_record, write_record
from suite.vaes import EMBEDDED

SHORT = {"wan2.1": 9, "wan2.2": 9, "cogvideox": 17}
"""Frames: a baseline is followed on the two shortest videos of at least so many, 8 apart. Memory is linear from there
in steps of 8 frames, which are whole groups of every architecture."""


Bytes = tuple[int | None, int | None]
"""On the device and on the host; None where it cannot be predicted."""


def keep_predictions(cases: Sequence[Case], folder: Path, made_by: dict[str, Any]) -> None:
    """One record per case. The cases share one video, and a process of their own."""
    if not all(finished(folder / f"{c.name}.json", c, made_by) for c in cases):
        found = in_fresh_process(partial(predict_all, cases), cases[0])
        for case in cases:
            write_record(folder / f"{case.name}.json", case.settings(), found[case.name], made_by)


def affordable(cases: Sequence[Case], folder: Path, limit_bytes: float) -> list[Case]:
    """Those that are predicted, by their records in the folder, to take no more, weights and latents included."""
    found = []
    for case in cases:
        path = folder / f"{case.name}.json"
        needed = read_record(path).metrics["device_bytes"] if path.exists() else None
        if needed is not None and needed <= limit_bytes:
            found.append(case)
    return found


def predict(case: Case) -> dict[str, Any]:
    """``peak_bytes`` as ``bench.memory.peak`` defines it, and the total on the device and on the host.

    No device is needed. MSE is predicted, and LPIPS for strategies (the planner knows its shapes); otherwise the
    numbers are None.
    """
    return predict_all([case], case)[case.name]


def predict_all(cases: Sequence[Case], first: Case) -> dict[str, Any]:
    """The same of several cases of one video, by name: they are planned together, less than a second for each."""
    with ShapesOnly():
        resident = _resident(Subject(replace(first, device="meta", loss="mse")))
    alike: dict[tuple[Checkpoint, FramesLoss], list[Case]] = {}
    peaks: dict[str, Bytes] = {}
    for case in cases:
        if _offloads_graphs(case):
            peaks[case.name] = (None, None)
        elif not isinstance(case.strategy, Baseline):
            inside = case.strategy.checkpoint if isinstance(case.strategy, Inside) else None
            where: FramesLoss = "whole" if isinstance(case.strategy, Whole) else "streamed"
            alike.setdefault((inside, where), []).append(case)
        else:
            peaks[case.name] = _baseline(case) if case.loss == "mse" else (None, None)
    for (inside, where), planned in alike.items():
        unknown: list[Bytes] = [(None, None)] * len(planned)
        found = _plan(planned, inside, where) if first.loss in ("mse", "lpips") else unknown
        peaks |= {case.name: pair for case, pair in zip(planned, found, strict=True)}
    return {
        name: {
            "peak_bytes": None if device is None else device - resident,
            "device_bytes": device,
            "host_bytes": host,
            "resident_bytes": resident,
        }
        for name, (device, host) in peaks.items()
    }


def _offloads_graphs(case: Case) -> bool:
    """What the planner cannot follow: there are no addresses by which to tell saved weights from activations."""
    inner = plain(case.strategy)
    return not isinstance(inner, Baseline) and inner.plan().offload and not inner.plan().recompute


def _plan(cases: Sequence[Case], checkpoint: Checkpoint, frames_loss: FramesLoss) -> list[Bytes]:
    """(device, host) bytes; of an estimate what its largest draw needs."""
    inner = [plain(case.strategy) for case in cases]
    strategies: list[Any] = [s.strategy if isinstance(s, Sampled) else s for s in inner]
    first = cases[0]
    found = plan(
        FULL_SIZE.get(first.vae) or str(EMBEDDED[first.vae]),
        first.frames,
        first.height,
        first.width,
        loss=first.loss,
        frames_loss=frames_loss,
        dtype=getattr(torch, first.dtype),
        trainable_decoder=first.trainable_decoder,
        strategies=strategies,
        checkpoint=checkpoint,
    )
    return [(p.device_bytes, p.host_bytes) for p in found]


def _resident(subject: Subject) -> int:
    """Bytes of weights and latents: what is on the device before the loss is computed."""
    return sum(p.nbytes for p in subject.decoder.parameters()) + subject.latents.nbytes


def _baseline(case: Case) -> tuple[int, int]:
    """(device, host) bytes: followed as it is when short, else on two short videos and along the line through them."""
    counts = [n for n in range(case.frames % 8, case.frames + 1, 8) if n >= SHORT[ARCHITECTURE[case.vae]]][:2]
    if len(counts) < 2 or counts[-1] >= case.frames:
        return _follow(case)
    near, far = (_follow(replace(case, frames=n)) for n in counts)
    steps = (case.frames - counts[1]) / (counts[1] - counts[0])
    device, host = (round(b + (b - a) * steps) for a, b in zip(near, far, strict=True))
    return device, host


def _follow(case: Case) -> tuple[int, int]:
    with FakeTensorMode():  # it keeps apart what a baseline moves between host and device on its own
        subject = Subject(replace(case, device="meta"))
        with PeakMemory("meta") as memory:
            subject.run()
        return memory.peak_bytes + _resident(subject), memory.host_peak_bytes or 0
