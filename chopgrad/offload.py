"""States, adjoints and features wait in host memory: copies that hide behind the computation.

On CUDA every copy runs on a side stream between pinned memory and the device. What leaves the device is held there
until the next departure, so that its memory is given back in the order of the computation and the peak does not depend
on how far the host runs ahead. What comes back can be fetched ahead of its use.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Offloaded:
    """A tensor in host memory, and its copy on the device while it leaves or once it is on its way back."""

    __slots__ = ("arrived", "host", "in_use", "on_device")

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.on_device: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.in_use: weakref.ref[Tensor] | None = None
        """The device copy handed out last: while somebody holds it, it need not be fetched again."""


class OffloadBuffer:
    """Moves the tensors of a pytree to host memory and back.

    On a CPU there is nowhere to go: trees are handed back as they are. Use it in a ``with`` block: at its end, also
    after an error, the computation waits for the copies under way, so that their memory can be given to others.

    Args:
        device: where the computation runs.
        enabled: False makes every method the identity too.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device = device
        self.enabled = enabled and device.type != "cpu"
        self._stream = torch.cuda.Stream(device) if self.enabled and device.type == "cuda" else None
        self._leaving: list[Offloaded] = []

    def __enter__(self) -> OffloadBuffer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.clear()

    def put(self, tree: Any) -> Any:
        """Start the way to the host. Until the next ``put`` or ``clear`` a ``get`` still finds the device copy."""
        if not self.enabled:
            return tree
        self.clear()
        return tree_map_only(Tensor, self._put, tree)

    def fetch(self, tree: Any) -> Any:
        """Start the way back to the device, ahead of a ``get`` of the same tree."""
        return tree_map_only(Offloaded, self._fetch, tree) if self.enabled else tree

    def get(self, tree: Any) -> Any:
        """The tree on the device, for the work that is enqueued from now on."""
        return tree_map_only(Offloaded, self._get, tree) if self.enabled else tree

    def clear(self) -> None:
        """Let go of the device copies that have left."""
        for offloaded in self._leaving:
            self._await(offloaded)
            offloaded.on_device = None
        self._leaving.clear()

    def _put(self, x: Tensor) -> Offloaded:
        offloaded = Offloaded(_host_buffer(x))
        offloaded.on_device = x
        self._copy(offloaded, to=offloaded.host, source=x)
        self._leaving.append(offloaded)
        return offloaded

    def _fetch(self, offloaded: Offloaded) -> Offloaded:
        if offloaded.on_device is None and offloaded.in_use is not None:
            offloaded.on_device = offloaded.in_use()
        if offloaded.on_device is None:
            # Memory of the computing stream: it is free for reuse in the order of the computation.
            offloaded.on_device = torch.empty_like(offloaded.host, device=self.device)
            self._copy(offloaded, to=offloaded.on_device, source=offloaded.host)
        return offloaded

    def _get(self, offloaded: Offloaded) -> Tensor:
        if any(offloaded is x for x in self._leaving):
            assert offloaded.on_device is not None
            return offloaded.on_device  # reading what leaves needs no waiting
        self._fetch(offloaded)
        self._await(offloaded)
        x, offloaded.on_device = offloaded.on_device, None
        assert x is not None
        offloaded.in_use = weakref.ref(x)
        return x

    def _copy(self, offloaded: Offloaded, to: Tensor, source: Tensor) -> None:
        if self._stream is None:
            to.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            offloaded.arrived = self._stream.record_event()

    def _await(self, offloaded: Offloaded) -> None:
        if offloaded.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(offloaded.arrived)
            offloaded.arrived = None


def _host_buffer(like: Tensor) -> Tensor:
    if like.is_cuda:
        try:
            return torch.empty_like(like, device="cpu", pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"No pinned host memory for {like.nbytes / 2**20:.0f} MiB ({str(error).splitlines()[0]}): using "
                "ordinary memory, whose copies are slower. Exact(offload=True, every=k) needs less of it.",
                stacklevel=2,
            )
    return torch.empty_like(like, device="cpu")


def saved_on_host(buffer: OffloadBuffer, weights: Iterable[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Let the activations that a graph saves wait on the host; ``weights`` stay where they are."""
    stay = {_storage(p) for p in weights}

    def pack(x: Tensor) -> Any:
        return x if _storage(x) in stay else buffer.put(x)

    return torch.autograd.graph.saved_tensors_hooks(pack, buffer.get)


def _storage(x: Tensor) -> int:
    # Known for tensors without data too, unlike their address, so that the planner can follow this.
    return x.untyped_storage()._cdata
