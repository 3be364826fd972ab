"""A book of what a computation takes, kept while it runs on tensors without data: live bytes, FLOPs and traffic."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from chopgrad.memory import tensors
from chopgrad.shapes import META, WithoutData, recipe, signature


class Work(NamedTuple):
    """What one operator does."""

    flops: int
    """Multiplications and additions of convolutions and products of matrices, each counted as one."""
    moved_bytes: int
    """What it reads and writes, each argument and result once."""
    kind: str
    """``"product"`` where it has FLOPs, else ``"elementwise"``."""


Works = Counter[Work]
"""How often each was done."""


class Ledger(WithoutData):
    """``with Ledger() as ledger: ...``: the computation runs on meta tensors, and each operator is entered once.

    An operator is worked out once for each shape of its arguments, as in ``chopgrad.shapes.ShapesOnly``; what is asked
    to be made on another device is made on meta. Some 20 microseconds an operator.

    Args:
        known: what was worked out before, to be shared by several ledgers.

    Attributes:
        live: bytes of the storages that operators have made and that are alive.
        peak: the highest ``live`` since it was last set.
        works: what was computed since then.
        at: what runs now, in the caller's words.
        moment: ``at`` when the peak was reached.
    """

    def __init__(self, known: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.works: Works = Counter()
        self.at = self.moment = -1
        self._known: dict[Any, _Entry] = {} if known is None else known
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": META}
        key = (func, signature(args), signature(tuple(kwargs.items())) if kwargs else ())
        entry = self._known.get(key)
        if entry is None:
            out = func(*args, **kwargs)
            self._known[key] = entry = _Entry.of(func, args, kwargs, out)
        else:
            out = func(*args, **kwargs) if entry.again is None else entry.again()
        if entry.work is not None:
            self.works[entry.work] += 1
        if entry.is_new:
            for x in tensors(out):
                self._add(x.untyped_storage())
        return out

    def begin(self) -> None:
        """Forget the peak and the work so far."""
        self.peak, self.works, self.moment = self.live, Counter(), self.at

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.live += size
        if self.live > self.peak:
            self.peak, self.moment = self.live, self.at

    def _remove(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self.live -= size


@dataclass
class _Entry:
    again: Callable[[], Any] | None
    """Makes such a result again; None where it must be asked for: a view, or an argument changed in place."""
    is_new: bool
    """The result has memory of its own."""
    work: Work | None
    """None of views, which do none."""

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, out: Any) -> _Entry:
        given = list(tensors((args, kwargs)))
        storages = {id(x.untyped_storage()) for x in given}
        made = list(tensors(out))
        is_new = any(id(x.untyped_storage()) not in storages for x in made)
        again = recipe(out, (args, kwargs))
        if not (is_new or func._schema.is_mutable) or not given:
            return cls(again, is_new, None)
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=out)) if count else 0
        moved = sum(_touched_bytes(x) for x in (*given, *made))
        return cls(again, is_new, Work(flops, moved, "product" if flops else "elementwise"))


def _touched_bytes(x: Tensor) -> int:
    """An expanded tensor is read once."""
    return min(x.nbytes, x.untyped_storage().nbytes())
