"""Readable names of pieces, from the modules that they call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from chopgrad.recurrence import Blocks, Recurrence

HALVES = {2: ("first half", "second half")}


class Names:
    """The name of each piece: what the modules that it calls have in common, and which part of its unit it is.

    Args:
        model: the recurrence.
        blocks: its blocks; the pieces are numbered through them.
    """

    def __init__(self, model: Recurrence, blocks: Blocks) -> None:
        self._paths = {id(module): name for name, module in model.vae.named_modules() if name}
        self._called: dict[int, list[str]] = {}
        self._part = f"{model.part}."
        self._place = [(k, len(unit)) for block in blocks for unit in block for k in range(len(unit))]

    @contextmanager
    def watching(self, k: int) -> Iterator[None]:
        """Whatever module runs inside belongs to piece k."""
        called = self._called.setdefault(k, [])

        def seen(module: nn.Module, args: Any) -> None:
            if id(module) in self._paths:
                called.append(self._paths[id(module)])

        handle = register_module_forward_pre_hook(seen)
        try:
            yield
        finally:
            handle.remove()

    def __getitem__(self, k: int) -> str:
        """Of piece k."""
        place, count = self._place[k]
        unit = [self._common(j) for j in range(k - place, k - place + count)]
        own = self._common(k)
        if count == 1 or (len(set(unit)) == count and all(unit)):
            return own or self._beside(k)
        part = HALVES.get(count, tuple(f"part {j + 1} of {count}" for j in range(count)))[place]
        return f"{own or next(filter(None, unit), self._beside(k))}, {part}"

    def _common(self, k: int) -> str:
        paths = [x.removeprefix(self._part).split(".") for x in self._called.get(k, [])]
        return ".".join(os.path.commonprefix(paths))  # of lists, element by element

    def _beside(self, k: int) -> str:
        before = next((x for x in map(self._common, range(k - 1, -1, -1)) if x), "")
        return f"what follows {before}" if before else f"piece {k + 1}"
