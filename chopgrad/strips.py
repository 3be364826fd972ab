"""Strips: pieces that are local in space (``chopgrad.local``) run on some of the rows at a time.

A third axis beside groups and pieces. What goes from piece to piece, and from group to group, is cut along its height
into blocks that correspond at every resolution. A strip is a block or more, run together with the rows beside it that
reach into it. So the graph of one strip of one piece of one group exists at a time. Nothing is left out: gradients of
rows that several strips have read add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from chopgrad.graph import Graph, total
from chopgrad.local import Local, Pooled
from chopgrad.offload import OffloadBuffer, Offloaded, dense
from chopgrad.recurrence import Features, Piece


@dataclass
class Cut:
    """A tensor [..., rows, width] as blocks of its rows; each may wait on the host, and is None once it is let go of.

    Args:
        scale: its rows for each row of what the recurrence takes.
    """

    blocks: list[Any]
    scale: int


register_pytree_node(Cut, lambda x: (x.blocks, x.scale), lambda blocks, scale: Cut([*blocks], scale))


class Pulled(NamedTuple):
    """Adjoints that a piece hands on: of its features (on the device), of parameters, and of the state (waiting)."""

    features: list[Any]
    parameters: list[Tensor | None]
    state: list[Any]


class Strips:
    """Walks pieces strip by strip, and those that are not local at once.

    Args:
        rows: of what the recurrence takes.
        count: blocks. Of small pieces a strip takes several: as many as make it no larger than one of the largest.
        host: where states and their adjoints wait.
    """

    def __init__(self, rows: int, count: int, host: OffloadBuffer) -> None:
        count = min(rows, count)
        self.bounds = [rows * j // count for j in range(count + 1)]
        self.host = host
        self._largest = 1

    def forward(
        self, piece: Piece, features: Features, state: Any, onward: bool, waiting: Sequence[Any] | None
    ) -> tuple[tuple[Any, ...], Any, Sequence[Any] | None]:
        """Run a piece without a graph.

        Args:
            features: tensors, or cut ones, whose blocks are let go of when they have been read.
            onward: whether the state for the next group is wanted.
            waiting: the features where they wait, if what the piece makes shall wait as well.

        Returns:
            What it makes, on the device; the slice of the state for the next group; and what it makes, where it waits.
        """
        if not isinstance(piece, Local) or not self.fits(features):
            return self._forward_at_once(piece, features, state, onward, waiting)
        cuts = [self.cut(x) for x in features]
        readers = [_Reader(x, self) for x in cuts]
        leaves, spec = tree_flatten(state, is_leaf=_is_cut)
        of_state = [_Reader(x, self) if _is_cut(x) else x for x in leaves]
        passed: list[int | None] = []
        outputs: list[_Made] = []
        after: list[_Made] = []
        pooled = _Statistics(self, piece, cuts)
        for strip in self.along(piece, cuts, [*readers, *of_state]):
            entering = tuple(strip.read(x) for x in readers)
            slices = tree_unflatten([strip.read(x) for x in of_state], spec)
            made, new = strip.run(readers, entering, slices, pooled.given)
            found, spec_after = tree_flatten(new)
            if not outputs:
                passed = [_place(x, entering) for x in made]
                outputs, after = [_Made(readers[0]) for _ in made], [_Made(readers[0]) for _ in found]
                kept_on = [cuts[k] for k in passed if k is not None]
                for x, reader in zip(cuts, readers, strict=True):
                    reader.consumes = all(x is not y for y in kept_on)
            leaving: list[_Made] = []
            for y, k, writer in zip(made, passed, outputs, strict=True):
                if k is None and writer.add(strip, y, waits=waiting is not None, keep=True):
                    leaving.append(writer)
            if onward:
                leaving += [w for y, w in zip(found, after, strict=True) if w.add(strip, y, waits=True, keep=False)]
            for writer, blocks in zip(leaving, self.host.put([w.leaving() for w in leaving]), strict=True):
                writer.waits(blocks)
            del entering, made, new, found
        results = tuple(cuts[k] if k is not None else x.cut() for k, x in zip(passed, outputs, strict=True))
        kept = None
        if waiting is not None:
            kept = [waiting[k] if k is not None else x.waiting() for k, x in zip(passed, outputs, strict=True)]
        return results, tree_unflatten([x.waiting() for x in after], spec_after) if onward else None, kept

    def reverse(
        self,
        piece: Piece,
        inputs: Sequence[Any],
        state: Any,
        seeds: Sequence[Any],
        after: Sequence[Any],
        part: Part | None,
        *,
        tracked: bool,
        **wanted: Any,
    ) -> Pulled:
        """What ``Graph.of`` and ``Graph.pull`` give for the piece, a strip at a time.

        Args:
            inputs: the features.
            seeds, after: adjoints of what the piece makes, let go of when they have been read, and of the state for the
                next group; None where there is none.
            part: adjoints are kept inside it only.
            tracked, wanted: as there.
        """
        if not isinstance(piece, Local) or not self.fits(inputs):
            graph = Graph.of(piece, tuple(self.joined(x) for x in inputs), self.joined(state), tracked)
            found = graph.pull(self.joined(seeds), self.joined(after), retain=False, **wanted)
            kept = [[part.inside(x) if part else x for x in adjoints] for adjoints in (found[0], found[2])]
            return Pulled(kept[0], found[1], self.host.put(kept[1]))
        cuts = [self.cut(x) for x in inputs]
        readers = [_Reader(x, self) for x in cuts]
        leaves, spec = tree_flatten(state, is_leaf=_is_cut)
        of_state = [_Reader(x, self) if _is_cut(x) else x for x in leaves]
        of_outputs, of_after = (
            [None if x is None else _Reader(self.cut(x), self, core_only=True, consumes=True) for x in adjoints]
            for adjoints in (seeds, after)
        )
        sums, sums_of_state = [_Sum(x, None, part) for x in readers], [_Sum(x, self.host, part) for x in of_state]
        parameters: list[Tensor | None] = [None] * len(wanted["parameters"])
        pooled = _Statistics(self, piece, cuts)
        for strip in self.along(piece, cuts, [*readers, *of_state, *of_outputs, *of_after]):
            adjoints = [strip.read(x) for x in (*of_outputs, *of_after)]
            if all(x is None for x in adjoints):
                continue
            entering = [strip.read(x) for x in readers]
            slices = tree_unflatten([strip.read(x) for x in of_state], spec)
            graph = Graph.of(strip.cropped(readers), (*entering, *pooled.given), slices, tracked)
            del entering, slices
            n = len(of_outputs)
            of_features, of_parameters, of_carry = graph.pull(adjoints[:n], adjoints[n:], retain=False, **wanted)
            del graph, adjoints
            parameters = total(parameters, of_parameters)
            pooled.add(of_features[len(cuts) :])
            for x, into in (*zip(of_features, sums, strict=False), *zip(of_carry, sums_of_state, strict=False)):
                into.add(strip, x)
            del of_features, of_parameters, of_carry
        pooled.pull(sums[0])
        return Pulled([x.cut() for x in sums], parameters, [x.cut() for x in sums_of_state] if wanted["carry"] else [])

    def parts(self, space: int) -> list[Part]:
        """The strips of the frames, each with what is at most ``space`` rows of the source away."""
        return [Part(self, j, (a - space, b + space)) for j, (a, b) in enumerate(pairwise(self.bounds))]

    def cut(self, x: Any) -> Cut:
        """A tensor, which may wait, as blocks, which are views of it on the device."""
        if isinstance(x, Cut):
            return x
        x = self.host.get(x)
        scale = x.shape[-2] // self.bounds[-1]
        return Cut([x[..., a * scale : b * scale, :] for a, b in pairwise(self.bounds)], scale)

    def joined(self, tree: Any) -> Any:
        """The tree on the device with whole tensors."""

        def join(x: Any) -> Any:
            return _Reader(x, self).read(0, self.bounds[-1] * x.scale) if _is_cut(x) else self.host.get(x)

        return tree_map(join, tree, is_leaf=lambda x: _is_cut(x) or isinstance(x, Offloaded))

    def _forward_at_once(
        self, piece: Piece, features: Features, state: Any, onward: bool, waiting: Sequence[Any] | None
    ) -> tuple[tuple[Any, ...], Any, Sequence[Any] | None]:
        entering = tuple(self.joined(x) for x in features)
        made, new = piece(entering, self.joined(state))
        passed = [_place(x, entering) for x in made]
        results = tuple(x if k is None else features[k] for x, k in zip(made, passed, strict=True))
        kept = None
        if waiting is not None:
            kept = [self.host.put(x) if k is None else waiting[k] for x, k in zip(made, passed, strict=True)]
        return results, self.host.put(new) if onward else None, kept

    def fits(self, features: Sequence[Any]) -> bool:
        """Whether features are, or can be, cut in blocks."""
        return all(_is_cut(x) or (len(x.shape) == 5 and x.shape[-2] % self.bounds[-1] == 0) for x in features)

    def count(self, piece: Local, cuts: Sequence[Cut]) -> int:
        """How many strips a piece is walked in."""
        size = piece.scale**2 * sum(x.nbytes for x in tree_leaves(cuts))
        self._largest = max(self._largest, size)
        return ceil((len(self.bounds) - 1) * size / self._largest)

    def along(self, piece: Local, cuts: Sequence[Cut], readers: Sequence[Any]) -> Iterator[_Strip]:
        """The strips from top to bottom; while one is worked on, the next one's blocks are on their way."""
        count, blocks = self.count(piece, cuts), len(self.bounds) - 1
        ends = [blocks * j // count for j in range(count + 1)]
        strips = [_Strip(p, q, self.bounds, piece, cuts[0].scale) for p, q in pairwise(ends)]
        for strip, following in zip_longest(strips, strips[1:]):
            ahead = [x for x in ((strip, following) if strip.p == 0 else (following,)) if x is not None]
            reading = [x for x in readers if isinstance(x, _Reader)]
            self.host.fetch([reader.missing(*x.rows(reader)) for x in ahead for reader in reading])
            yield strip


@dataclass(frozen=True)
class Part:
    """A strip of the frames whose adjoint is swept back alone (arXiv 2603.17812, Sec. 3.3), and how far it goes.

    Args:
        block: of the frames.
        rows: of the source: the first that it reaches, and the last (not included).
    """

    strips: Strips
    block: int
    rows: tuple[int, int]

    def seed(self, adjoint: Tensor | None) -> Cut | None:
        """The adjoint of this strip of a group's frames."""
        if adjoint is None:
            return None
        cut = self.strips.cut(adjoint)
        return Cut([x if j == self.block else None for j, x in enumerate(cut.blocks)], cut.scale)

    def inside(self, x: Tensor | None) -> Tensor | None:
        """An adjoint, zero where it is not kept."""
        if x is None:
            return None
        scale = x.shape[-2] // self.strips.bounds[-1]
        top, bottom = (max(0, row * scale) for row in self.rows)
        kept = torch.zeros_like(x)
        kept[..., top:bottom, :] = x[..., top:bottom, :]
        return kept


@dataclass(frozen=True)
class _Strip:
    """Blocks p .. q - 1 of everything that a piece takes and makes, and the rows beside them that reach into it."""

    p: int
    q: int
    bounds: Sequence[int]
    piece: Local
    scale: int
    """Of the main features."""

    def rows(self, reader: _Reader) -> tuple[int, int]:
        """First and last (not included) of the rows that the piece is given."""
        scale = reader.scale
        beside = 0 if reader.core_only else ceil(self.piece.radius * scale / self.scale)
        start, stop = self.bounds[self.p] * scale, self.bounds[self.q] * scale
        return max(0, start - beside), min(self.bounds[-1] * scale, stop + beside)

    def read(self, x: Any) -> Any:
        return x.read(*self.rows(x)) if isinstance(x, _Reader) else x

    def core(self, x: Tensor, like: _Reader) -> Tensor:
        """What belongs to these blocks of what the piece made of ``like``, or of ``like`` itself."""
        start, stop = self.rows(like)
        scale, rest = divmod(x.shape[-2], stop - start)
        if rest:
            raise RuntimeError(
                f"A piece that says it is local makes {x.shape[-2]} rows of {stop - start}, which is no multiple."
            )
        top, count = self.bounds[self.p] * like.scale - start, (self.bounds[self.q] - self.bounds[self.p]) * like.scale
        return x[..., top * scale : (top + count) * scale, :]

    def run(
        self, readers: Sequence[_Reader], features: Features, state: Any, statistics: Sequence[Tensor]
    ) -> tuple[Features, Any]:
        """Run the piece on these rows, and of a pooled one with the statistics of all."""
        if statistics and isinstance(self.piece, Pooled):
            return self.piece.run_with(features, state, statistics[0], [self.rows(x) for x in readers])
        return self.piece.run(features, state)

    def cropped(self, readers: Sequence[_Reader]) -> Piece:
        """The piece, given statistics behind the features, and handing out what belongs to these blocks."""

        def run(given: Features, state: Any) -> tuple[Features, Any]:
            features, statistics = given[: len(readers)], given[len(readers) :]
            made, new = self.run(readers, features, state, statistics)
            outputs = tuple(self.core(x, readers[_place(x, features) or 0]) for x in made)
            return outputs, tree_map_only(Tensor, lambda x: self.core(x, readers[0]), new)

        return run


class _Reader:
    """Reads rows from top to bottom, each block fetched once.

    Args:
        x: what is read.
        core_only: no strip reads beside its own blocks.
        consumes: let go of blocks that are over.
    """

    def __init__(self, x: Cut, strips: Strips, core_only: bool = False, consumes: bool = False) -> None:
        self.scale, self.core_only, self.consumes = x.scale, core_only, consumes
        self.edges = [bound * x.scale for bound in strips.bounds]
        self._x, self._host = x, strips.host
        self._here: dict[int, Tensor] = {}

    def read(self, start: int, stop: int) -> Any:
        """Rows start .. stop - 1, or None where there is nothing in them."""
        parts: list[tuple[int, Any]] = []
        for j, (top, bottom) in enumerate(pairwise(self.edges)):
            if bottom <= start:
                self._here.pop(j, None)
                if self.consumes:
                    self._x.blocks[j] = None
            elif top < stop:
                if j not in self._here and self._x.blocks[j] is not None:
                    self._here[j] = self._host.get(self._x.blocks[j])
                block: Any = self._here.get(j)
                a, b = max(start, top) - top, min(stop, bottom) - top
                whole = block is None or (a, b) == (0, bottom - top)
                parts.append((b - a, block if whole else block[..., a:b, :]))
        there = next((x for _, x in parts if x is not None), None)
        if there is None or len(parts) == 1:
            return there
        filled = [there.new_zeros(*there.shape[:-2], n, there.shape[-1]) if x is None else x for n, x in parts]
        return torch.cat(filled, dim=-2)

    def missing(self, start: int, stop: int) -> list[Any]:
        """The blocks of these rows that are not here."""
        spans = enumerate(pairwise(self.edges))
        there = [j for j, (top, bottom) in spans if top < stop and start < bottom and j not in self._here]
        return [self._x.blocks[j] for j in there]


class _Made:
    """Collects what a piece makes, block by block.

    Args:
        like: of what it is made.
    """

    def __init__(self, like: _Reader) -> None:
        self._like = like
        self._scale = 1
        self._value: Any = None
        self._here: list[Any] = []
        self._leaving: list[Tensor] = []
        self._waiting: list[Any] = []

    def add(self, strip: _Strip, x: Any, *, waits: bool, keep: bool) -> bool:
        """Args:
            waits: its blocks are to leave.
            keep: it is wanted on the device.

        Returns:
            Whether there are blocks to leave.
        """
        if not isinstance(x, Tensor):
            self._value = x
            return False
        core = strip.core(x, self._like)
        first = strip.bounds[strip.p]
        self._scale = core.shape[-2] // (strip.bounds[strip.q] - first)
        spans = pairwise(strip.bounds[strip.p : strip.q + 1])
        blocks = [dense(core[..., (a - first) * self._scale : (b - first) * self._scale, :]) for a, b in spans]
        if keep:
            self._here += blocks
        if waits:
            self._leaving = blocks
        return waits

    def leaving(self) -> list[Tensor]:
        """The blocks to leave, of which the owner now is who asks."""
        blocks, self._leaving = self._leaving, []
        return blocks

    def waits(self, blocks: list[Any]) -> None:
        """These wait on the host."""
        self._waiting += blocks

    def cut(self) -> Any:
        return Cut(self._here, self._scale) if self._here else self._value

    def waiting(self) -> Any:
        return Cut(self._waiting, self._scale) if self._waiting else self._value


class _Sum:
    """Adds up adjoints of what was read, and sends blocks on their way that no further strip reaches.

    Args:
        reader: of what they are the adjoints, if it was read by strips.
        host: where they wait; None: nowhere.
        part: to keep what is inside it only.
    """

    def __init__(self, reader: Any, host: OffloadBuffer | None, part: Part | None) -> None:
        self._reader, self._host = reader if isinstance(reader, _Reader) else None, host
        self._rows = part.rows if part else (0, None)
        self._blocks: list[Any] = []
        self._sent = 0

    def add(self, strip: _Strip, x: Tensor | None) -> None:
        if self._reader is None:
            return
        edges = self._reader.edges
        self._blocks = self._blocks or [None] * (len(edges) - 1)
        start, stop = strip.rows(self._reader)
        for j, (top, bottom) in enumerate(pairwise(edges)):
            a, b = self._clipped(max(start, top), min(stop, bottom))
            if x is None or b <= a:
                continue
            part = x[..., a - start : b - start, :]
            if self._blocks[j] is not None:
                self._blocks[j][..., a - top : b - top, :] += part  # made here: a strip that others reach into is cut
            elif b - a == bottom - top:
                self._blocks[j] = dense(part)
            else:
                self._blocks[j] = x.new_zeros(*x.shape[:-2], bottom - top, x.shape[-1])
                self._blocks[j][..., a - top : b - top, :] = part
        done = strip.bounds[strip.q] * self._reader.scale
        done -= 0 if strip.q == len(edges) - 1 else stop - done  # the next strip reads as far back as this one ahead
        while self._sent < len(self._blocks) and edges[self._sent + 1] <= done:
            if self._host is not None and self._blocks[self._sent] is not None:
                self._blocks[self._sent] = self._host.put(self._blocks[self._sent])
            self._sent += 1

    def add_core(self, strip: _Strip, x: Tensor) -> None:
        """The same, once all is added, for what no other strip reads; on the device."""
        assert self._reader is not None
        first = self._reader.edges[strip.p]
        for j in range(strip.p, strip.q):
            top, bottom = self._reader.edges[j : j + 2]
            a, b = self._clipped(top, bottom)
            if b <= a:
                continue
            if self._blocks[j] is None:
                self._blocks[j] = x.new_zeros(*x.shape[:-2], bottom - top, x.shape[-1])
            self._blocks[j] = dense(self._blocks[j])
            self._blocks[j][..., a - top : b - top, :] += x[..., a - first : b - first, :]

    def _clipped(self, top: int, bottom: int) -> tuple[int, int]:
        assert self._reader is not None
        first, last = self._rows
        scale = self._reader.scale
        return max(top, first * scale), bottom if last is None else min(bottom, last * scale)

    def cut(self) -> Cut | None:
        there = any(x is not None for x in self._blocks)
        return Cut(self._blocks, self._reader.scale) if there and self._reader else None


class _Statistics:
    """Those that a pooled piece takes over all rows; of other pieces nothing.

    Attributes:
        given: what the piece is given.
    """

    def __init__(self, strips: Strips, piece: Local, cuts: Sequence[Cut]) -> None:
        self.given: tuple[Tensor, ...] = ()
        self._piece: Any = piece
        self._adjoint: Tensor | None = None
        if not isinstance(piece, Pooled) or strips.count(piece, cuts) == 1:
            return
        self._read = lambda: _each(strips, piece, cuts)
        with torch.no_grad():
            self._parts = [(strip, piece.statistics(x)) for strip, x in self._read()]
        for _, part in self._parts:
            part.requires_grad_()
        with torch.enable_grad():
            rows = [strip.bounds[strip.q] - strip.bounds[strip.p] for strip, _ in self._parts]
            self._of_all = piece.pool([part for _, part in self._parts], rows)
        self.given = (self._of_all.detach(),)

    def add(self, adjoints: Sequence[Tensor | None]) -> None:
        """Adjoints of what is given, by one strip."""
        for adjoint in adjoints:
            if adjoint is not None:
                self._adjoint = adjoint if self._adjoint is None else self._adjoint + adjoint

    def pull(self, into: _Sum) -> None:
        """Add what the main features get by the statistics."""
        if self._adjoint is None:
            return
        of_parts = torch.autograd.grad(self._of_all, [part for _, part in self._parts], self._adjoint)
        for (strip, x), adjoint in zip(self._read(), of_parts, strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                statistics = self._piece.statistics(x)
            into.add_core(strip, *torch.autograd.grad(statistics, x, adjoint))


def _each(strips: Strips, piece: Local, cuts: Sequence[Cut]) -> Iterator[tuple[_Strip, Tensor]]:
    """The main features strip by strip."""
    reader = _Reader(cuts[0], strips, core_only=True)
    for strip in strips.along(piece, cuts, [reader]):
        x = strip.read(reader)
        yield strip, x


def _place(x: Any, features: Sequence[Any]) -> int | None:
    """Which of the features it is, if a piece only passes it on."""
    return next((k for k, y in enumerate(features) if y is x), None)


def _is_cut(x: Any) -> bool:
    return isinstance(x, Cut)
