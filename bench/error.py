"""Gradient error of every strategy and baseline against full back-propagation, on a real clip through trained weights.

With g the gradient of full back-propagation and b that of the method, both at the latents:

- relative error |b - g| / |g|, cosine, and best-scaled error min_s |s b - g| / |g|;
- the same relative error against the exact gradient of the loss *on the frames that the method compares*, which tells
  a wrong decode from a loss on fewer frames (they are the same number for every strategy of the library);
- how far its frames are from those of the plain decode: root mean square over the pixels that it produces.

Of an estimate b is random: see ``bench.estimates``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Baseline, Part
from bench.cases import Case, Method
from bench.estimates import errors_over_draws
from bench.memory import finished, in_fresh_process
from bench.subject import Subject
from chopgrad import Full, Sampled
from suite.bootstrap import mean_interval
from suite.clips import find_clips, seeded_crop
from suite.pairwise import pairwise_gradients
from suite.records import write_record

AVERAGED = ("relative_error", "cosine", "best_scaled_error", "relative_error_same_frames", "frames_rms_difference")
OF_ESTIMATES = ("relative_error_of_mean", "relative_variance")


def measure_errors(cases: Sequence[Case], folder: Path, made_by: dict[str, Any], crops: int = 2) -> None:
    """One record per case. The cases share one VAE and video size, and a process of their own."""
    if all(finished(folder / f"{c.name}.json", c, made_by) for c in cases):
        return
    found = in_fresh_process(partial(compare_all, cases, crops), cases[0])
    for case in cases:
        write_record(folder / f"{case.name}.json", case.settings(), found[case.name], made_by)


def compare_all(cases: Sequence[Case], crops: int, first: Case) -> dict[str, Any]:
    """Metrics by name of the case; full back-propagation is done once per crop."""
    subject = Subject(first.video)
    samples: dict[Method, list[dict[str, Any]]] = {case.strategy: [] for case in cases}
    for path in find_clips(None):
        for k in range(crops):
            video, start = seeded_crop(path, k, first.frames, (first.height, first.width), first.seed)
            subject.show(video)
            reference = Reference(subject)
            for method, found in samples.items():
                found.append({"clip": path.name, "crop": k, "first_frame": start} | compare(subject, method, reference))
    result: dict[str, Any] = {}
    for case in cases:
        found = samples[case.strategy]
        clips = [s["clip"] for s in found]
        names = (*AVERAGED, *(OF_ESTIMATES if isinstance(case.strategy, Sampled) else ()))
        means = {name: list(mean_interval([s[name] for s in found], clips)) for name in names}
        result[case.name] = {**means, "frames_compared": found[0]["frames_compared"], "samples": found}
    return result


class Reference:
    """Frames and gradient of full back-propagation, and the gradient of a loss on some of the pixels."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        with torch.no_grad():
            self.frames = subject.decoder.decode(subject.latents)
        _, self.gradient = subject.run(Full())

    @cached_property
    def pairs(self) -> Tensor:
        """[i, j, ...] of dL_i/dz_j."""
        subject = self.subject
        target = subject.target.to(subject.latents.device)
        return pairwise_gradients(subject.decoder, subject.latents, target, [subject.loss_fn])[0]

    def gradient_on(self, parts: Sequence[Part]) -> Tensor:
        """Exact gradient of the loss on the pixels that the parts stand for."""
        leaf = self.subject.latents.detach().clone().requires_grad_()
        frames = self.subject.decoder.decode(leaf)
        target = self.subject.target.to(frames.device)
        losses = (p.share * self.subject.loss_fn(p.of(frames), p.of(target)) for p in parts)
        return torch.autograd.grad(torch.stack(list(losses)).sum(), leaf)[0]


def compare(subject: Subject, method: Method, reference: Reference) -> dict[str, Any]:
    """The measures above for one crop."""
    if isinstance(method, Sampled):
        result: dict[str, Any] = errors_over_draws(method, reference.pairs)
    else:
        _, gradient = subject.run(method)
        result = errors(gradient, reference.gradient)
    if not isinstance(method, Baseline):
        return result | {
            "relative_error_same_frames": result["relative_error"],
            "frames_compared": reference.frames.shape[2],
            "frames_rms_difference": 0.0,  # the forward pass does not depend on the strategy
        }
    with torch.no_grad():
        parts = list(method.parts(subject.decoder, subject.latents))
    squares = sum((p.frames - p.of(reference.frames)).square().sum().item() for p in parts)
    numbers = torch.arange(reference.frames.shape[2])
    return result | {
        "relative_error_same_frames": errors(gradient, reference.gradient_on(parts))["relative_error"],
        "frames_compared": len({int(n) for p in parts for n in numbers[p.where[0]]}),
        "frames_rms_difference": math.sqrt(squares / sum(p.frames.numel() for p in parts)),
    }


def errors(gradient: Tensor, reference: Tensor) -> dict[str, float]:
    b, g = gradient.flatten().double(), reference.flatten().double()
    cosine = (b @ g / (b.norm() * g.norm())).clamp(-1, 1).item()
    return {
        "relative_error": ((b - g).norm() / g.norm()).item(),
        "cosine": cosine,
        "best_scaled_error": math.sqrt(1 - cosine**2),
    }
