"""Peak memory of a case as the planner predicts it, on tensors that have shapes and no data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.baselines import Baseline
from bench.cases import ARCHITECTURE, FULL_SIZE, Case, Inside, plain
from bench.subject import Subject
from chopgrad import Sampled
from chopgrad.memory import PeakMemory
from chopgrad.planner import plan
from chopgrad.shapes import ShapesOnly
from suite.vaes import EMBEDDED

SHORT = {"wan2.1": 9, "wan2.2": 9, "cogvideox": 17}
"""Frames: a baseline is followed on the two shortest videos of at least so many, 8 apart. Memory is linear from there
in steps of 8 frames, which are whole groups of every architecture."""


def predict(case: Case) -> dict[str, Any]:
    """``peak_bytes`` as ``bench.memory.peak`` defines it, and the total on the device and on the host.

    A second or less; no device is needed. MSE is predicted, and LPIPS for strategies (the planner knows its shapes);
    otherwise the numbers are None.
    """
    strategy = plain(case.strategy)
    if isinstance(strategy, Sampled):
        strategy = strategy.strategy  # what the largest draw needs
    device: int | None = None
    host: int | None = None
    if isinstance(strategy, Baseline):
        if case.loss == "mse":
            device, host = _baseline(case)
    elif case.loss in ("mse", "lpips"):
        (found,) = plan(
            FULL_SIZE.get(case.vae) or str(EMBEDDED[case.vae]),
            case.frames,
            case.height,
            case.width,
            loss=case.loss,
            dtype=getattr(torch, case.dtype),
            trainable_decoder=case.trainable_decoder,
            strategies=[strategy],
            checkpoint=case.strategy.checkpoint if isinstance(case.strategy, Inside) else None,
        )
        device, host = found.device_bytes, found.host_bytes
    with ShapesOnly():
        resident = _resident(Subject(replace(case, device="meta", loss="mse")))
    return {
        "peak_bytes": None if device is None else device - resident,
        "device_bytes": device,
        "host_bytes": host,
        "resident_bytes": resident,
    }


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
