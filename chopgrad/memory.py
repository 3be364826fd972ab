"""Peak memory of a piece of work: the allocator's peak on CUDA, the exact peak of live storages elsewhere."""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Iterator
from math import ceil, isqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chopgrad.offload import most_pinned_bytes, pinned_bytes

_LIFT_FRESH = torch.ops.aten.lift_fresh.default


class PeakMemory:
    """``with PeakMemory(device) as memory: ...`` then ``memory.peak_bytes``.

    On CUDA: the caching allocator's highest allocation in the block minus what was allocated when it was entered (other
    threads' work on the device included; cuDNN workspaces included; the context and fragmentation not).

    Elsewhere: the highest sum of the storages on this device that operators returned in the block and that were alive
    at the same time, each counted once however many tensors share it. Fake tensors are followed like real ones, so the
    peak of a model that fits no machine can be computed (enter the fake mode first; ``meta`` then plays the device
    beside which ``cpu`` is the host). Buffers inside an operator are not seen.

    Cost: none on CUDA; some microseconds per operator elsewhere, so do not time inside it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.peak_bytes = 0
        """Valid after the block."""
        self.host_peak_bytes: int | None = None
        """The same for tensors in host memory, where ``device`` is another one; not known on CUDA."""
        self._at_entry = 0
        self._storages: LiveStorages | None = None

    def live_bytes(self, device_type: str) -> int:
        """What is alive now of the storages that were made in the block. Not for CUDA: ask its allocator."""
        if self._storages is None:
            raise RuntimeError("live_bytes is known inside the block only, and where the device is not CUDA.")
        return self._storages.live[device_type]

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._at_entry = torch.cuda.memory_allocated(self.device)
        else:
            self._storages = LiveStorages()
            self._storages.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._storages is not None:
            self._storages.__exit__(kind, error, traceback)
            self.peak_bytes = self._storages.peak[self.device.type]
            self.host_peak_bytes = self._storages.peak["cpu"]
            self._storages = None
        else:
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._at_entry


def available_bytes(device: torch.device | str) -> int | None:
    """Memory that is free now, of the CUDA device or of the host; less where a process or control group is given less.

    What PyTorch keeps for itself, on the device or pinned on the host, is free for the next allocation. So is a control
    group's page cache that was not used lately.

    None where it is not known: for ``meta``, and on systems without ``/proc/meminfo``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:  # which not all of PyTorch's functions take
            device = torch.device("cuda", torch.cuda.current_device())
        allocated, (free, total) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        # torch.cuda.set_per_process_memory_fraction, for processes that share a card
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free + torch.cuda.memory_reserved(device), allowed) - allocated)
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        pass
    return free + _kept_pinned_bytes()


def _kept_pinned_bytes() -> int:
    """Pinned host memory that we used before and do not use now, and that PyTorch does not give back.

    Of pinned memory that others have nobody knows whether they use it.
    """
    if not torch.cuda.is_initialized():  # asking would initialise it
        return 0
    stats: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()  # PyTorch 2.6 does not tell
    # Its own count of bytes in use ("active_bytes") is wrong in 2.11: it subtracts one for each block that is freed.
    return max(0, min(stats.get("allocated_bytes.current", 0), most_pinned_bytes()) - pinned_bytes())


def affordable_every(groups: int, state_bytes: int, device: torch.device | str) -> int:
    """The smallest ``every`` of ``Exact`` with which its states take at most half the memory that is free now.

    On the host, whose memory the processes of one machine share, it is half of a process's share of it; how many there
    are is read from ``LOCAL_WORLD_SIZE``, as torchrun sets it.

    Args:
        groups: frame groups of the video, and so states.
        state_bytes: size of one.
        device: where they are kept.
    """
    there = available_bytes(device)
    if there is None or state_bytes == 0:
        return 1
    if torch.device(device).type == "cpu":
        there //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sparsest = max(1, isqrt(groups))  # beyond it there are more states to rebuild at one time than are saved
    kept = {k: groups if k == 1 else ceil(groups / k) + k for k in range(1, sparsest + 1)}
    return next((k for k, n in kept.items() if n * state_bytes <= there / 2), sparsest)


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators return, per device type, and subtracts each when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        asked = kwargs.get("device")  # under chopgrad.shapes the result may be elsewhere
        for x in tensors(out):
            storage = x.untyped_storage()
            if id(storage) in self._known:
                continue
            # An operator that only views or changes one of its arguments makes no new storage; lift_fresh hands over
            # what torch.tensor has just made.
            if func is _LIFT_FRESH or all(storage is not y.untyped_storage() for y in tensors((args, kwargs))):
                self._add(storage, (asked or x.device).type)
        return out

    def _add(self, storage: torch.UntypedStorage, device: str) -> None:
        # A storage's Python object lives exactly as long as the storage, so its id and a weak reference can be trusted.
        key, size = id(storage), storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._remove(key, device, size))
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])

    def _remove(self, key: int, device: str, size: int) -> None:
        self._known.pop(key, None)
        self.live[device] -= size


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results: it takes and gives tensors, and lists of them."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from tensors(y)
    elif isinstance(x, dict):
        yield from tensors(tuple(x.values()))
