"""What the card and its bus can do, whatever the library: transfers, pinning, convolutions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

GIB = 2**30
FAST_PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""For ``PYTORCH_ALLOC_CONF``, before PyTorch starts: pages are touched by several threads and registered then."""


VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second until PyTorch 2.8
ALLOCATOR = " ".join(filter(None, (os.environ.get(name) for name in VARIABLES)))


def clock(work: Callable[[], object], device: str) -> float:
    """Seconds, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_bytes() -> int | None:
    """The host's memory; None where nobody tells."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def host() -> dict[str, Any]:
    """Cores, memory, and how the allocator is set."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "allocator": ALLOCATOR, "host_bytes": host_bytes()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def transfers(device: str, size: int = GIB) -> dict[str, Any]:
    """GiB/s: pinning, to the device, to the host, and both at once (their sum)."""
    pins = device == "cuda"
    made: list[torch.Tensor] = []
    pinning = clock(lambda: made.append(torch.empty(size, dtype=torch.uint8, pin_memory=pins)), device)
    here = [*made, torch.empty(size, dtype=torch.uint8, pin_memory=pins)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in here]
    pageable = torch.ones(size, dtype=torch.uint8)
    side = torch.cuda.Stream() if pins else None

    def up() -> None:
        there[0].copy_(here[0], non_blocking=True)

    def down() -> None:
        here[1].copy_(there[1], non_blocking=True)

    def both() -> None:
        up()
        with torch.cuda.stream(side):
            down()

    times = {
        name: min(clock(work, device) for _ in range(3))
        for name, work in {
            "to_device": up,
            "to_host": down,
            "both_ways": both,
            "pageable_to_device": lambda: there[0].copy_(pageable),
        }.items()
    }
    sizes = {name: size * (2 if name == "both_ways" else 1) / GIB for name in times}
    return {"pinning_gib_per_s": size / GIB / pinning} | {f"{n}_gib_per_s": sizes[n] / t for n, t in times.items()}


def fast_pinning(seconds: float) -> dict[str, Any]:
    """Pinning in a fresh process with ``FAST_PINNING``; None where this PyTorch does not know it."""
    code = (
        "import time, torch; torch.cuda.init(); torch.empty(1, pin_memory=True); t = time.perf_counter(); "
        "x = torch.empty(2**31, dtype=torch.uint8, pin_memory=True); print(2 / (time.perf_counter() - t))"
    )
    environment = os.environ | dict.fromkeys(VARIABLES, FAST_PINNING)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=seconds
        )
        return {"fast_pinning_gib_per_s": float(done.stdout)}
    except (subprocess.TimeoutExpired, ValueError):
        return {"fast_pinning_gib_per_s": None}


CONVOLUTIONS = ((96, 4, 480, 832), (192, 4, 240, 416), (384, 2, 120, 208))
"""Channels, frames, height, width: where a group of Wan 2.1 at 480x832 spends its time."""


def convolutions(device: str, shapes: tuple[tuple[int, int, int, int], ...] = CONVOLUTIONS) -> list[dict[str, Any]]:
    """TFLOP/s of a 3x3x3 convolution, forwards and backwards with frozen weights, and its workspace."""
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    return [_convolution(device, *shape, layout) for shape in shapes for layout in layouts]


def _convolution(
    device: str, channels: int, frames: int, height: int, width: int, layout: torch.memory_format
) -> dict[str, Any]:
    conv = nn.Conv3d(channels, channels, 3, padding=(0, 1, 1), device=device, dtype=torch.bfloat16)
    conv = conv.requires_grad_(False).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(1, channels, frames + 2, height, width, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=layout).requires_grad_()
    y = conv(x)
    g = torch.randn_like(y)
    workspace = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        conv(x.detach())
        workspace = torch.cuda.max_memory_allocated() - before - y.nbytes
    forward = min(clock(lambda: conv(x.detach()), device) for _ in range(4))
    backward = min(clock(lambda: torch.autograd.grad(y, x, g, retain_graph=True), device) for _ in range(4))
    flop = 2 * 27 * channels**2 * frames * height * width
    return {
        "channels": channels,
        "layout": str(layout).removeprefix("torch."),
        "forward_tflop_per_s": flop / forward / 1e12,
        "backward_tflop_per_s": flop / backward / 1e12,
        "workspace_bytes": workspace,
    }
