"""One method on one video: peaks, times beside the reference's, and how far its gradient is from others."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

import chopgrad
from bench.baselines import Baseline
from bench.cases import Inside, Method, Whole
from bench.gpu.card import clock
from bench.gpu.rows import Call, Row
from bench.subject import Subject
from chopgrad import offload

Run = Callable[[], Tensor]
"""Returns the gradient of the latents."""


class Video:
    """A row's decoder, latents and target on the device."""

    def __init__(self, row: Row, dtype: str, device: str) -> None:
        self.row, self.device = row, device
        self.subject = Subject(row.case(chopgrad.Full(), dtype, device))
        if row.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            for weight in self.subject.decoder.parameters():
                if weight.ndim in formats:
                    weight.data = weight.data.to(memory_format=formats[weight.ndim])
            self.subject.latents = self.subject.latents.to(memory_format=torch.channels_last_3d)

    def run(self, call: Call, method: Method) -> Run:
        """A call of the method."""
        if call == "frame_loss":
            return lambda: self.subject.run(method)[1]
        if isinstance(method, Baseline | Whole):
            raise ValueError(f"{method} has a call of its own: measure it as frame_loss.")
        inside, strategy = (method.checkpoint, method.strategy) if isinstance(method, Inside) else (None, method)
        vae = self.subject.decoder.vae

        def whole() -> Tensor:
            leaf = self.subject.latents.detach().clone().requires_grad_()
            if call == "decode":
                decoder = chopgrad.decoder_for(vae, checkpoint=inside, check=False)
                frames = chopgrad.decode(decoder, leaf, strategy)
            else:
                frames = vae.decode(leaf).sample
            loss = self.subject.loss_fn(frames, self.subject.target.to(leaf.device))
            del frames
            return torch.autograd.grad(loss, leaf)[0]

        def patched() -> Tensor:
            handle = chopgrad.patch(vae, strategy, checkpoint=inside)
            try:
                return whole()
            finally:
                handle.remove()

        return patched if call == "patch" else whole

    def forward(self) -> Any:
        """The forward pass alone, without graphs."""
        with torch.no_grad():
            self.subject.decoder.decode(self.subject.latents)


def give_back(host: bool) -> None:
    """Empty the allocator's caches: of the device, and of pinned host memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if host:
            torch._C._host_emptyCache()


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Peaks of a block, in bytes: allocated and requested beyond what was there, reserved, pinned and in use.

    Also the ``every`` that was chosen, and the seconds that pinning took.
    """
    found: dict[str, Any] = {}
    count, most = offload._count_pinned, offload.pinned_bytes()

    def counted(size: int) -> None:
        nonlocal most
        count(size)
        most = max(most, offload.pinned_bytes())

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and isinstance(record.args[0], int):
                found["every"] = record.args[0]

    log, handler = logging.getLogger("chopgrad"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    offload._count_pinned = counted  # type: ignore[assignment]
    on_cuda = device == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, pinning = torch.cuda.memory_stats(), _pinning_seconds()
    try:
        yield found
    finally:
        offload._count_pinned = count
        log.removeHandler(handler)
        log.setLevel(level)
        if on_cuda:
            torch.cuda.synchronize()
            after = torch.cuda.memory_stats()
            for kind in ("allocated", "requested"):
                at = before[f"{kind}_bytes.all.current"]
                found[f"{kind}_peak_bytes"] = after[f"{kind}_bytes.all.peak"] - at
            found["resident_bytes"] = before["allocated_bytes.all.current"]
            found["reserved_peak_bytes"] = after["reserved_bytes.all.peak"]
            found["retries"] = after["num_alloc_retries"] - before["num_alloc_retries"]
            found["pinned_peak_bytes"] = most
            found["pinning_s"] = _pinning_seconds() - pinning


def _pinning_seconds() -> float:
    return host_stats().get("host_alloc_time.total", 0) / 1e6


def host_stats() -> dict[str, int]:
    """Of pinned memory; PyTorch 2.6 has none."""
    found: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
    return found


def _retries(device: str) -> int:
    """How often the allocator had to give memory back and ask again, which takes time."""
    return int(torch.cuda.memory_stats()["num_alloc_retries"]) if device == "cuda" else 0


def difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def measure(run: Run, reference: Run | None, rounds: int, device: str) -> tuple[dict[str, Any], Tensor]:
    """Metrics, and the gradient of the last call.

    Args:
        reference: called right before every timed call. None: the method is the reference.
    """
    with watched(device) as metrics:
        gradients: list[Tensor] = []
        metrics["first_s"] = clock(lambda: gradients.append(run().cpu()), device)
    times: list[float] = []
    references: list[float] = []
    retries = _retries(device)
    try:
        for _ in range(rounds):
            if reference is not None:
                references.append(clock(reference, device))
            times.append(clock(lambda: gradients.append(run().cpu()), device))
    except Exception as error:  # what was measured before is a result
        metrics["stopped"] = f"{type(error).__name__} in the timed rounds"
    references = references[: len(times)] if reference is not None else []
    metrics |= {"seconds": times, "reference_seconds": references, "rounds": len(times)}
    metrics["retries_in_rounds"] = _retries(device) - retries
    ratios = [a / b for a, b in zip(times, references, strict=False)]
    metrics["time_ratio"] = median(ratios) if ratios else None
    # Convolutions on a GPU add in an order of their own: what two calls of one method differ by.
    metrics["repeat_difference"] = difference(gradients[0], gradients[-1]) if times else None
    if not torch.isfinite(gradients[-1]).all():
        raise FloatingPointError("the gradient is not finite")
    return metrics, gradients[-1]


def repeated(run: Run, calls: int, device: str) -> dict[str, Any]:
    """Memory that the allocator holds after each call: constant, if nothing leaks."""
    reserved, seconds = [], []
    for _ in range(calls):
        seconds.append(clock(run, device))
        reserved.append(torch.cuda.memory_reserved() if device == "cuda" else 0)
    return {"reserved_after_call_bytes": reserved, "call_seconds": seconds}
