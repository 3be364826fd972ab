"""Peaks of pieces walked in strips, followed on tensors without data: no formula knows how strips meet blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from chopgrad.local import Local
from chopgrad.offload import OffloadBuffer
from chopgrad.planner.ledger import Ledger
from chopgrad.recurrence import Features, Piece
from chopgrad.shapes import META
from chopgrad.strips import Cut, Strips

LIKELY = 0.7
"""Pieces are followed whose strips are estimated to take this share of the most that is estimated. In the published
decoders the piece that takes most was estimated at 0.97 of the most or above."""


class Entering(NamedTuple):
    """What a piece is called with in a group of full size, without data."""

    piece: Piece
    features: Features
    state: Any
    whole_bytes: int
    """Peak of its backward pass where it is run at once, beyond what enters."""
    leaving_bytes: int


class InStrips:
    """The backward pass of one group by strips.

    Args:
        entering: what each of its pieces is called with.
        rows: of what the recurrence takes.
        parameters: whose gradients are wanted.
        tracked: whether the gradient of what the recurrence takes is wanted.
    """

    def __init__(self, entering: Sequence[Entering], rows: int, parameters: Sequence[Tensor], tracked: bool) -> None:
        self._entering, self._rows, self._parameters, self._tracked = entering, rows, parameters, tracked
        self.peak = lru_cache(self._peak)
        self.estimate = lru_cache(self._estimated)
        self._known: dict[Any, Any] = {}

    def _peak(self, count: int, offload: bool) -> tuple[int, int]:
        """Most bytes on the device beyond what waits, and at which piece.

        Args:
            count: strips.
            offload: features, states and their adjoints wait on the host.

        Cost: a second for sixteen strips of a published decoder.
        """
        with torch.no_grad(), torch.device(META):
            strips = Strips(self._rows, count, OffloadBuffer(META, offload))
            estimates = self._estimates(strips)
            likely = [k for k, x in enumerate(estimates) if x >= LIKELY * max(estimates)]
            peaks: dict[Any, tuple[int, int]] = {}
            for k in likely:
                each = self._entering[k]
                alike = each.whole_bytes, each.leaving_bytes, _shapes(each.features), _shapes(each.state)
                if alike not in peaks:
                    peaks[alike] = self._followed(strips, k), k
            return max(peaks.values())

    def _estimated(self, count: int, offload: bool) -> tuple[int, int]:
        """The same in no time, between 0.6 and 1.1 times what it is for the published decoders, 1.25 for small ones."""
        strips = Strips(self._rows, count, OffloadBuffer(META, offload))
        estimates = self._estimates(strips)
        most = max(estimates)
        return int(most), estimates.index(most)

    def _estimates(self, strips: Strips) -> list[float]:
        for piece, features, *_ in self._entering:  # of which the largest sets the number of strips of the others
            if isinstance(piece, Local) and strips.fits(features):
                strips.count(piece, [strips.cut(x) for x in features])
        return [self._estimate(strips, *each) for each in self._entering]

    def _estimate(
        self, strips: Strips, piece: Piece, features: Features, state: Any, whole_bytes: int, leaving_bytes: int
    ) -> float:
        there = sum(x.nbytes for x in tree_leaves((features, state)) if isinstance(x, Tensor))
        if not isinstance(piece, Local) or not strips.fits(features):
            return whole_bytes + there
        share = 1 / strips.count(piece, [strips.cut(x) for x in features])
        return share * (whole_bytes + 3 * there) + leaving_bytes

    def _followed(self, strips: Strips, k: int) -> int:
        piece, features, state, *_ = self._entering[k]
        host = strips.host

        def cut(x: Tensor) -> Any:
            """As it comes from the piece before: in blocks of their own."""
            if not isinstance(piece, Local) or not strips.fits([x]):
                return torch.empty_like(x)
            like = strips.cut(x)
            return Cut([torch.empty(block.shape, dtype=block.dtype) for block in like.blocks], like.scale)

        def wait(x: Tensor) -> Any:
            return host.put(cut(x))

        with _OnDevice(self._known) as ledger, host:
            made, after = piece(features, state)
            inputs, waiting = tree_map_only(Tensor, wait, (features, state))
            of_after = [wait(x) if isinstance(x, Tensor) else None for x in tree_leaves(after)]
            like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in made]
            host.clear()
            del made, after
            base = ledger.live - sum(x.nbytes for x in like)
            seeds = [cut(x) for x in like]
            del like
            ledger.begin()
            strips.reverse(
                piece, inputs, waiting, seeds, of_after, None, tracked=k > 0 or self._tracked,
                features=k > 0 or self._tracked, parameters=self._parameters, carry=True,
            )  # fmt: skip
            return ledger.peak - base


class _OnDevice(Ledger):
    """What is asked to be on the host is not entered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_host = (kwargs or {}).get("device") == torch.device("cpu")
        if on_host:
            return func(*args, **kwargs | {"device": META})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _shapes(tree: Any) -> Any:
    return tuple(x.shape if isinstance(x, Tensor) else None for x in tree_leaves(tree))
