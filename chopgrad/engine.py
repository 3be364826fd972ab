"""The one engine: a forward pass over frame groups, and reverse sweeps that carry the adjoint of the state backwards.

A sweep starts from the adjoints of the frames, dL/dx_i for frame group i, wherever they come from: from a loss that
sees one group at a time (``chopgrad.frame_loss``) or from one that sees the whole video (``chopgrad.decode``). Frame
groups are cut into blocks [a, b). For each block the groups a .. min(b + D, T) - 1 are swept from last to first;
gradients are kept for the latents and parameters of groups a .. b - 1 only, and the adjoint is cut at a. All strategies
are this loop with other settings.

A group is a chain of pieces (``chopgrad.forward``), so the sweep goes over a grid, groups times pieces: the graph of
one piece exists at a time, and with offloading the slices of the state and of its adjoint visit the device one by one.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chopgrad.adjoints import FrameAdjoints, computes_in_float16, unscaled
from chopgrad.forward import Carry, Forward
from chopgrad.graph import Graph, total
from chopgrad.memory import affordable_every
from chopgrad.offload import OffloadBuffer, SavedOnHost
from chopgrad.recurrence import Features, Group, Piece, Recurrence
from chopgrad.strategies import Plan
from chopgrad.strips import Strips

_log = logging.getLogger("chopgrad")

See = Callable[[int, Tensor], None]
"""``(group index, its frames)``, called for every group in order as soon as it is decoded."""

Adjoint = list[Any]
"""For each piece the adjoints of its slice's leaves; None where there is none."""


@dataclass
class Kept:
    """What waits for a backward pass, by frame group."""

    carries: dict[int, Carry]
    """``carries[i]`` enters group i; kept for recomputation."""
    graphs: dict[int, Graph] = field(default_factory=dict)
    """Of whole groups."""
    inputs: dict[int, list[Features]] = field(default_factory=dict)
    """What enters each piece of the group that is swept first."""

    def copy(self) -> Kept:
        return Kept(dict(self.carries), dict(self.graphs), {i: list(x) for i, x in self.inputs.items()})


@dataclass
class Gradients:
    """Of the source (a decoder's latents) and of parameters; None for what no adjoint reached, as with ordinary
    back-propagation.
    """

    source: Tensor | None
    parameters: list[Tensor | None]


class Sweep:
    """One decode and its (possibly truncated) vector-Jacobian product.

    Args:
        model: the recurrence: a decoder, or an encoder.
        groups: its groups for this source.
        plan: block, distance, recompute, offload, every, pieces.
        source: what it runs on: latents [batch, channels, latent_frames, h, w], or frames; read, never written.
        source_needs_grad: whether its gradient is wanted.
        parameters: those of the model whose gradient is wanted.
        scored: groups whose frames may have an adjoint. Groups after the last of them are not decoded, and no graph is
            built where none is in reach.
        first: first group whose gradient is wanted; the adjoint is cut there.
        origin: a group at which a block begins.
    """

    def __init__(
        self,
        model: Recurrence,
        groups: Sequence[Group],
        plan: Plan,
        source: Tensor,
        source_needs_grad: bool,
        parameters: Sequence[Tensor],
        scored: Collection[int],
        first: int = 0,
        origin: int = 0,
    ) -> None:
        self.scored = sorted(scored)
        self.model, self.groups = model.for_pieces() if plan.pieces else model, groups[: self.scored[-1] + 1]
        self.source, self.source_needs_grad = source, source_needs_grad
        self.parameters, self.plan, self.first = list(parameters), plan, first
        self.every = plan.every or 1
        self.host = OffloadBuffer(source.device, plan.offload and plan.recompute)
        self.saved = OffloadBuffer(source.device, plan.offload and not plan.recompute)
        self._saved_on_host = SavedOnHost(self.saved, self.model.parameters()) if self.saved.enabled else None
        self._strips = Strips(source.shape[-2] // model.row_unit, plan.strips, self.host) if plan.strips else None
        self._parts = self._strips.parts(plan.space) if self._strips and plan.space is not None else [None]
        self._forward = Forward(self.model, self.groups, source, plan.pieces, self.host, self._strips, plan.resident)
        self._forward.repeats = plan.recompute
        count, block = len(self.groups), plan.block
        self._starts = sorted({first, *(range(first + (origin - first) % block, count, block) if block else ())})
        self.half = computes_in_float16(source)
        self._adjoints = FrameAdjoints(self.host, self.half)
        self._kept, self._block_start = Kept({}), first
        """What ``pull`` starts from."""

    def decode(self, see: See, keep: bool = False) -> Kept:
        """Decode all groups, in the memory of one state.

        Args:
            keep: return that with which ``gradients`` can begin later: the carries that the plan keeps where all groups
                are one block, else the one that enters the first group in reach; and the graphs that it keeps.
        """
        self._forward.repeats = keep
        with self.host:
            kept = Kept({0: self._forward.initial_carry()})
            for i in range(len(self.groups)):
                keeps = keep and self._keeps(i, kept.carries, self.first, spaced=self.plan.block is None)
                see(i, self._advance(i, keeps, keep and self._keeps_graph(i), kept))
            return kept

    def gradients(self, see: See | None = None, begun: Kept | None = None) -> Gradients:
        """The gradients that the plan keeps, of the adjoints that ``add_adjoint`` was given by the time of each sweep.

        Args:
            see: is shown the frames of every group that is decoded here, and may add adjoints.
            begun: what ``decode`` returned; what it decoded for good is not decoded again. Its graphs are used up.
        """
        count = len(self.groups)
        self._kept = kept = (
            Kept(dict(begun.carries), begun.graphs) if begun else Kept({0: self._forward.initial_carry()})
        )
        done = count if begun and self.plan.block is None else min(kept.carries)
        result = self._nothing()
        with self.host, self.saved:
            for a, b in self._blocks():
                self._block_start = a
                end = min(b + self.plan.distance, count)
                start = max((i for i in self.scored if a <= i < end), default=None)  # where the sweep begins
                for i in range(done, end):
                    # When recomputing, the group that is swept first is swept at once, so that it need not run again.
                    at_once = i == start == end - 1 or self._keeps_graph(i)
                    swept = at_once if self.plan.recompute else self._in_reach(i)
                    keeps = self.plan.recompute and self._keeps(i, kept.carries, a, spaced=True)
                    frames = self._advance(i, keeps, swept, kept)
                    if see is not None:
                        see(i, frames)
                    del frames
                done = max(done, end)
                self.host.clear()
                self.saved.clear()
                if start is not None:
                    self._reverse(a, b, start, kept, self._adjoints, result)
                for i in range(a, b):
                    self._adjoints.drop(i)
        return result

    def add_adjoint(self, i: int, adjoint: Tensor) -> None:
        """Add to dL/dx_i, [batch, 3, frames of the group, H, W]; without effect once group i is swept for good."""
        if i >= self._block_start:
            self._adjoints.add(i, adjoint)

    @property
    def keeps_adjoints(self) -> bool:
        """Until the end: all groups are one block."""
        return self.plan.block is None

    def take_adjoints(self, other: Sweep) -> None:
        """Those that another sweep was given."""
        self._adjoints = other._adjoints

    def pull(self, i: int, adjoint: Tensor) -> Gradients:
        """The gradients of ``(frames of group i * adjoint).sum()`` alone, while ``see`` is shown group i."""
        result, alone = self._nothing(), FrameAdjoints(self.host, self.half)
        alone.add(i, adjoint)
        self._reverse(self._block_start, i + 1, i, self._kept.copy(), alone, result, retain=True)
        return result

    @property
    def _whole(self) -> bool:
        return not self.plan.pieces

    def _nothing(self) -> Gradients:
        return Gradients(None, [None] * len(self.parameters))

    def _blocks(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, [*self._starts[1:], len(self.groups)], strict=True))

    def _in_reach(self, i: int) -> bool:
        """Whether an adjoint is swept back to group i for its own gradient (if not, then neither for an earlier)."""
        if i < self.first:
            return False
        last = self._blocks()[bisect_right(self._starts, i) - 1][1] - 1 + self.plan.distance
        return any(i <= j <= last for j in self.scored)

    def _keeps_graph(self, i: int) -> bool:
        """Whether its graph is kept though the plan recomputes: of the last groups, which are swept first."""
        return self._whole and self._in_reach(i) and i >= len(self.groups) - self.plan.graphs

    def _keeps(self, i: int, carries: dict[int, Carry], a: int, spaced: bool) -> bool:
        """Whether what enters group i is kept: of the first group in reach, and with ``spaced`` of every k-th after a.

        A state that is not kept is rebuilt from the last one that is.
        """
        if i == 2 and self.plan.every is None:
            self.every = self._affordable_every(carries[i])  # the first carry of full size
        return self._in_reach(i) and (i == min(carries) or (spaced and (i - a) % self.every == 0))

    def _advance(self, i: int, keeps: bool, swept: bool, kept: Kept) -> Tensor:
        """Run group i and return its frames.

        What a group that will be ``swept`` without running again needs is left: its graph, or its pieces' inputs.
        """
        carries = kept.carries
        carry_in = carries[i] if keeps else carries.pop(i)
        if swept and self._whole:
            (piece,) = self._forward.pieces
            with self._forward.unchanged():
                kept.graphs[i] = graph = self._graph(
                    piece, (self._forward.taken(i),), self.host.get(carry_in[0]), self.source_needs_grad
                )
            onward = i + 1 < len(self.groups)
            frames, carry = graph.outputs[0], [self.host.put(graph.detached_carry())] if onward else []
        else:
            inputs: list[Features] = []
            frames, carry = self._forward.run(i, carry_in, inputs if swept else None)
            if swept:
                kept.inputs[i] = inputs
        if i + 1 < len(self.groups):
            carries[i + 1] = carry
        return frames

    def _reverse(
        self,
        a: int,
        b: int,
        start: int,
        kept: Kept,
        adjoints: FrameAdjoints,
        result: Gradients,
        retain: bool = False,
    ) -> None:
        """Sweep groups ``start`` to a, add the gradients of groups a .. b - 1 to ``result``, and cut at a.

        Args:
            retain: keep all graphs.
        """
        host, graphs, carries = self.host, kept.graphs, kept.carries
        scale = adjoints.scale(a, start)
        adjoint: list[Adjoint] | None = None
        for i in range(start, a - 1, -1):
            in_block, cut = i < b, i == a
            carry: Carry = [None] if i in graphs else self._carry(i, carries)
            inputs = kept.inputs.pop(i, None) or self._forward.inputs(i, carry)
            if self._whole and not cut:
                host.fetch(carries.get(i - 1))
            if self._strips:
                host.clear()  # of the forward pass; where the adjoint is cut nothing leaves that would do it
            pieces = self._forward.pieces
            before: list[Adjoint] = [[[] for _ in pieces] for _ in self._parts]
            yielded = adjoints.get(i, scale)
            for n, part in enumerate(self._parts):
                seeds: list[Any] = [part.seed(yielded) if part else yielded]
                if n + 1 == len(self._parts):
                    del yielded
                for k in reversed(range(len(pieces))):
                    after: list[Any] = adjoint[n][k] if adjoint else []
                    if adjoint:
                        adjoint[n][k] = []
                    entering = inputs[k]
                    if n + 1 == len(self._parts):
                        inputs.pop()
                    tracked = k > 0 or self.source_needs_grad
                    wanted: dict[str, Any] = {
                        "features": k > 0 or (in_block and self.source_needs_grad),
                        "parameters": self.parameters if in_block else [],
                        "carry": not cut,
                    }
                    if self._strips:
                        seeds, of_parameters, before[n][k] = self._strips.reverse(
                            pieces[k], entering, carry[k], seeds, after, part, tracked=tracked, **wanted
                        )
                    else:
                        features, state, after = host.get(entering), host.get(carry[k]), host.get(after)
                        if k:
                            host.fetch([inputs[-1], carry[k - 1], adjoint[n][k - 1] if adjoint else None])
                        graph = graphs.pop(i, None) or self._graph(pieces[k], features, state, tracked)
                        del features, state
                        again = retain or (not in_block and not self.plan.recompute)
                        if again and not self.plan.recompute:
                            graphs[i] = graph
                        seeds, of_parameters, of_state = graph.pull(seeds, after, retain=again, **wanted)
                        before[n][k] = of_state if self._whole else host.put(of_state)
                        del graph, of_state
                    del after, entering  # before the next graph is built
                    if in_block:
                        result.parameters = total(result.parameters, [unscaled(x, scale) for x in of_parameters])
                        if k == 0:
                            (of_source,) = self._strips.joined(seeds) if self._strips else seeds
                            self._record(result, i, unscaled(of_source, scale))
                    del of_parameters
            adjoint = before
            if in_block:
                carries.pop(i, None)  # no later block starts before b
        host.clear()

    def _record(self, result: Gradients, i: int, of_taken: Tensor | None) -> None:
        if of_taken is not None:
            if result.source is None:
                result.source = torch.zeros_like(self.source, dtype=of_taken.dtype)
            result.source[:, :, self.groups[i].takes] += of_taken  # groups may overlap in what they take

    def _carry(self, i: int, carries: dict[int, Carry]) -> Carry:
        """The carry that enters group i: kept, or rebuilt from the last one kept before it."""
        if i not in carries:
            start = max(j for j in carries if j < i)
            for j in range(start, i):
                _, carries[j + 1] = self._forward.run(j, carries[j])
        return carries[i]

    def _affordable_every(self, carry: Carry) -> int:
        if self.source.is_meta:  # memory is being predicted, for another machine
            return 1
        size = sum(x.nbytes for x in tree_leaves(carry) if isinstance(x, Tensor))
        every = affordable_every(len(self.groups), size, "cpu" if self.host.enabled else self.source.device)
        _log.info("every=%d: %d groups with states of %.2f GiB", every, len(self.groups), size / 2**30)
        return every

    def _graph(self, piece: Piece, features: Features, carry: Any, tracked: bool) -> Graph:
        with self._saved_on_host.hooks() if self._saved_on_host else nullcontext():
            return Graph.of(piece, features, carry, tracked)
