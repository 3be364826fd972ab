"""States, adjoints and features wait in host memory: copies that hide behind the computation.

On CUDA copies run between pinned memory and the device on two side streams, one for each direction. What leaves the
device is held there until the next departure, so that its memory is given back in the order of the computation and the
peak does not depend on how far the host runs ahead. What comes back can be fetched ahead of its use.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import register_pytree_node, tree_map_only

SMALLEST_PART = 2**20
"""Bytes below which host memory is not cut any finer."""


class Offloaded:
    """A tensor in host memory, and its copy on the device while it leaves or once it is on its way back.

    As a pytree it is its ``parts``.

    Args:
        parts: its elements in the order of its memory, one after the other.
        shape, stride: of the tensor, whose memory has no gaps.
    """

    __slots__ = ("__weakref__", "arrived", "changed", "in_use", "on_device", "parts", "shape", "stride", "version")

    def __init__(self, parts: Sequence[Tensor], shape: torch.Size, stride: tuple[int, ...]) -> None:
        self.parts, self.shape, self.stride = list(parts), shape, stride
        self.on_device: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.in_use: weakref.ref[Tensor] | None = None
        """The device copy handed out last: while somebody holds it, it need not be fetched again."""
        self.version: int | None = None
        self.changed = False
        """The tensor was changed in place while it left: nobody knows which values arrived."""


register_pytree_node(Offloaded, lambda x: (x.parts, (x.shape, x.stride)), lambda parts, how: Offloaded([*parts], *how))


class OffloadBuffer:
    """Moves the tensors of a pytree to host memory and back.

    On a CPU there is nowhere to go: trees are handed back as they are. So are tensors that are on another device. Use
    it in a ``with`` block: at its end, also after an error, the computation waits for the copies under way, so that
    their memory can be given to others.

    Args:
        device: where the computation runs.
        enabled: False makes every method the identity too.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device = device
        self.enabled = enabled and device.type != "cpu"
        none: tuple[torch.cuda.Stream | None, torch.cuda.Stream | None] = None, None
        self._out, self._back = _streams(device) if self.enabled and device.type == "cuda" else none
        self._leaving: list[Offloaded] = []

    def __enter__(self) -> OffloadBuffer:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self._out, self._back):
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
        self.clear()

    def put(self, tree: Any) -> Any:
        """Start the way to the host. Until the next ``put`` or ``clear`` a ``get`` still finds the device copy."""
        if not self.enabled:
            return tree
        self.clear()
        tree = tree_map_only(Tensor, self._put, tree)
        self._copy(self._out, self._leaving, out=True)
        return tree

    def fetch(self, tree: Any) -> Any:
        """Start the way back to the device, ahead of a ``get`` of the same tree."""
        coming: list[Offloaded] = []
        tree = self._each(lambda offloaded: self._fetch(offloaded, coming), tree)
        self._copy(self._back, coming, out=False)
        return tree

    def get(self, tree: Any) -> Any:
        """The tree on the device, for the work that is enqueued from now on."""
        return self._each(self._get, tree)

    def clear(self) -> None:
        """Let go of the device copies that have left."""
        for offloaded in self._leaving:
            self.settle(offloaded)
            offloaded.changed = _version(offloaded.on_device) != offloaded.version
            offloaded.on_device = None
        self._leaving.clear()

    def land(self) -> None:
        """Wait until all that left is on the host, for code that reads it there: hooks of the user's."""
        if self._out is not None:
            self._out.synchronize()

    def settle(self, offloaded: Offloaded) -> None:
        """Let the work that is enqueued from now on wait for its copy, out or back."""
        if offloaded.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(offloaded.arrived)
            offloaded.arrived = None

    def forget(self, offloaded: Offloaded) -> None:
        """Let go of a device copy that was fetched and not asked for."""
        if not any(offloaded is x for x in self._leaving):
            self.settle(offloaded)
            offloaded.on_device = None

    def takes(self, x: Tensor) -> bool:
        """Whether it is ordinary memory of this device; a subclass may be more than its memory."""
        ordinary = type(x) in (Tensor, nn.Parameter, FakeTensor) and x.layout is torch.strided and not x.is_quantized
        return ordinary and x.device == self.device

    def _each(self, move: Any, tree: Any) -> Any:
        if not self.enabled:
            return tree
        return tree_map_only(Offloaded, move, tree, is_leaf=lambda x: isinstance(x, Offloaded))

    def _put(self, x: Tensor) -> Any:
        if not self.takes(x):
            return x
        x = dense(x.detach() if x.requires_grad else x)  # copied where the computation runs, in its memory
        offloaded = Offloaded(_host_parts(x), x.shape, x.stride())
        offloaded.on_device, offloaded.version = x, _version(x)
        self._leaving.append(offloaded)
        return offloaded

    def _fetch(self, offloaded: Offloaded, coming: list[Offloaded]) -> Offloaded:
        if offloaded.on_device is None and offloaded.in_use is not None:
            offloaded.on_device = offloaded.in_use()
        if offloaded.on_device is None:
            # Memory of the computing stream: it is free for reuse in the order of the computation.
            dtype = offloaded.parts[0].dtype
            offloaded.on_device = torch.empty_strided(
                offloaded.shape, offloaded.stride, dtype=dtype, device=self.device
            )
            coming.append(offloaded)
        return offloaded

    def _get(self, offloaded: Offloaded) -> Tensor:
        if any(offloaded is x for x in self._leaving):
            offloaded.changed = _version(offloaded.on_device) != offloaded.version
        if offloaded.changed:
            raise RuntimeError("A tensor that the backward pass needs was changed in place after it was saved.")
        if any(offloaded is x for x in self._leaving):
            assert offloaded.on_device is not None
            return offloaded.on_device  # reading what leaves needs no waiting
        self.fetch(offloaded)
        self.settle(offloaded)
        x, offloaded.on_device = offloaded.on_device, None
        assert x is not None
        offloaded.in_use = weakref.ref(x)
        return x

    def _copy(self, stream: torch.cuda.Stream | None, moving: Sequence[Offloaded], out: bool) -> None:
        """All of them, after what is enqueued now; one wait and one event for them together."""
        if not moving:
            return

        def copy(**how: bool) -> None:
            for offloaded in moving:
                assert offloaded.on_device is not None
                there = _cut(offloaded.on_device, offloaded.parts)
                for here, part in zip(offloaded.parts, there, strict=True):
                    here.copy_(part, **how) if out else part.copy_(here, **how)

        if stream is None:
            return copy()
        # So it follows what the computation has waited for: a copy back comes after the same tensor has left.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            copy(non_blocking=True)
            arrived = stream.record_event()
        for offloaded in moving:
            offloaded.arrived = arrived


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Out and back. The same for every call: PyTorch caches memory for each stream, and keeps it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where its memory has gaps or is a part of a larger storage."""
    return x if _fills(x) else x.clone()


def _fills(x: Tensor) -> bool:
    """Whether x is its whole storage, each element once. Equal sizes do not say so: overlaps can make up for gaps."""
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return bool(x.storage_offset() == 0 and span == x.numel() and x.untyped_storage().nbytes() == x.nbytes)


def _version(x: Tensor | None) -> int | None:
    """Counts changes in place; None where nothing does."""
    return None if x is None or x.is_inference() else x._version


def part_sizes(size: int) -> list[int]:
    """Bytes of the parts in which ``size`` bytes wait on the host.

    PyTorch rounds pinned memory up to a power of two, up to twice what was asked for. So the parts are powers of two,
    but for the last; at most a sixteenth of ``size``, or 1 MiB, is lost.
    """
    unit = max(SMALLEST_PART, (1 << (size - 1).bit_length()) // 32) if size else 0
    parts = []
    while size > unit:
        parts.append(1 << (size.bit_length() - 1))
        size -= parts[-1]
    return [*parts, size] if size or not parts else parts


_pinned = _most_pinned = 0


def pinned_bytes() -> int:
    """Pinned host memory in which something waits now, as PyTorch rounds it."""
    return _pinned


def most_pinned_bytes() -> int:
    """The most that it ever was."""
    return _most_pinned


def _count_pinned(size: int) -> None:
    global _pinned, _most_pinned
    _pinned += size
    _most_pinned = max(_most_pinned, _pinned)


def _host_parts(x: Tensor) -> list[Tensor]:
    counts = [size // x.element_size() for size in part_sizes(x.nbytes)]
    if x.is_cuda:
        try:
            parts = [torch.empty(n, dtype=x.dtype, device="cpu", pin_memory=True) for n in counts]
        except RuntimeError as error:
            warnings.warn(
                f"No pinned host memory for {x.nbytes / 2**20:.0f} MiB ({str(error).splitlines()[0]}): using "
                "ordinary memory, whose copies are slower. Exact(offload=True, every=k) needs less of it.",
                stacklevel=2,
            )
        else:
            for part in parts:
                size = 1 << (part.nbytes - 1).bit_length() if part.nbytes else 0
                _count_pinned(size)
                # A storage's Python object lives exactly as long as the storage.
                weakref.finalize(part.untyped_storage(), _count_pinned, -size).atexit = False
            return parts
    return [torch.empty(n, dtype=x.dtype, device="cpu") for n in counts]


def _cut(x: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The memory of a dense x, in pieces as long as ``like``."""
    return x.as_strided((x.numel(),), (1,)).split([part.numel() for part in like])


class _Saved(NamedTuple):
    """A tensor that a graph saves: what waits for it, and how it lies in that memory."""

    offloaded: Offloaded
    place: int
    """Number in the order of saving; a backward pass asks in the reverse order."""
    shape: torch.Size
    stride: tuple[int, ...]


class SavedOnHost:
    """Lets the activations that graphs save wait on the host; each storage once, and the next on its way in time.

    Args:
        weights: these stay where they are.
    """

    def __init__(self, buffer: OffloadBuffer, weights: Iterable[Tensor]) -> None:
        self._buffer = buffer
        self._stay = {id(p.untyped_storage()) for p in weights}
        self._count = 0
        self._places: weakref.WeakValueDictionary[int, Offloaded] = weakref.WeakValueDictionary()
        self._known: dict[Any, tuple[weakref.ref[Any], weakref.ref[Offloaded]]] = {}
        self._ahead: Offloaded | None = None
        """On its way back before anybody asked. Its graph may die first, or something else may be asked for."""

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While these are entered, what is saved leaves for the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor) -> Any:
        if not self._buffer.takes(x):
            return x.detach()  # a node that saved what it returns would keep itself alive
        storage = x.untyped_storage()
        if id(storage) in self._stay:
            return x
        # One tensor is often saved twice, by the operator that made it and by the one that takes it, or in other views.
        whole = _fills(x)
        place_in_it = () if whole else (x.storage_offset(), x.shape, x.stride())
        key = (id(storage), x._version, x.dtype, x.is_conj(), x.is_neg(), place_in_it)
        alive, waiting = self._known.get(key, (lambda: None, lambda: None))
        offloaded = waiting() if alive() is storage else None
        if offloaded is None:
            offloaded, known = self._buffer.put(x), self._known
            known[key] = weakref.ref(storage, lambda _: known.pop(key, None)), weakref.ref(offloaded)
        self._count += 1
        self._places[self._count] = offloaded
        return _Saved(offloaded, self._count, x.shape, x.stride() if whole else offloaded.stride)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        x = self._buffer.get(saved.offloaded)
        if self._ahead is not None and self._ahead is not saved.offloaded:
            self._buffer.forget(self._ahead)
        self._ahead = self._places.get(saved.place - 1)
        self._buffer.fetch(self._ahead)
        return x if (x.shape, x.stride()) == saved[2:] else x.as_strided(saved.shape, saved.stride)
