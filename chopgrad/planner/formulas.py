"""Peak memory by closed formulas from the profile of a few groups: a strategy in microseconds, where a sweep takes
seconds.

Write T for the number of groups, c for a state, A for the graph of a group, F for what a group yields, Z for the source
and x_k for what enters piece k. A video's peak is that of one group among what waits for it:

==============================  ==========================================  =========================================
strategy                        on the device, beside 2 Z                   on the host
==============================  ==========================================  =========================================
graphs kept, window of n        n A + c, and what pulling adds to A         (none)
``Exact()``                     T c + T F + the pull of a group             (none)
... ``offload``                 2 c + the pull of a group                   T c + T F
... ``pieces``                  T c + T F + x + the pull of a piece         (none)
... ``offload, pieces``         the pull of a piece, and its neighbours     T c + T F + x
``every=k``                     T c becomes (T/k + k) c                     the same
==============================  ==========================================  =========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from chopgrad.planner.profile import GroupProfile, PieceProfile, Profile
from chopgrad.strategies import Full, Plan, Strategy


class Need(NamedTuple):
    """What a strategy takes at its peak, and when that is."""

    device_bytes: int
    host_bytes: int
    moment: str
    """Which piece, such as "up_blocks.3.resnets.0, first half, backward"; or "loss"."""


@dataclass(frozen=True)
class Surroundings:
    """What is on the device beside the sweep.

    Attributes:
        streams: the loss sees one group at a time (``frame_loss``), else the whole video.
        loss_bytes: peak of the loss of what it sees, beyond that: the target, its graph and the adjoint.
        held_bytes: what waits of it during the sweep: of a whole video frames, target and adjoint.
        gradient_bytes: of the source, where it is wanted, and of the parameters.
    """

    streams: bool
    loss_bytes: int
    held_bytes: int
    gradient_bytes: int


def need(strategy: Strategy, profile: Profile, around: Surroundings) -> Need:
    """Peaks on the device (weights and source included) and on the host.

    Accuracy: against the sweeping planner within 5 % on the device and on the host, for the published and the embedded
    decoders of ``tests/chopgrad/test_formulas.py``.
    """
    return _Video(strategy.plan(), profile, around, isinstance(strategy, Full)).need()


class _Video:
    def __init__(self, plan: Plan, profile: Profile, around: Surroundings, one_graph: bool) -> None:
        self.plan, self.profile, self.around = plan, profile, around
        self.one_graph = one_graph and not around.streams
        self.count = profile.groups
        self.window = self.count if plan.block is None else min(plan.block + plan.distance, self.count)

    def need(self) -> Need:
        resident = self.profile.weight_bytes + self.profile.source_bytes
        device, host, moment = self._recomputed() if self.plan.recompute else self._retained()
        phases = [(device + self.around.gradient_bytes + self.around.held_bytes, moment)]
        phases.append((self._before_loss() + self.around.loss_bytes, "loss"))
        device, moment = max(phases)
        return Need(resident + device, host, moment)

    def group(self, i: int) -> GroupProfile:
        first = self.profile.first
        return first[i] if i < len(first) else self.profile.steady

    def states(self, start: int, stop: int) -> int:
        """Bytes of those that enter groups start .. stop - 1."""
        first = len(self.profile.first)
        some = sum(self.group(i).state_bytes for i in range(start, min(stop, first)))
        return some + max(0, stop - max(start, first)) * self.profile.steady.state_bytes

    def yields(self, start: int, stop: int) -> int:
        first = len(self.profile.first)
        some = sum(self.group(i).yields_bytes for i in range(start, min(stop, first)))
        return some + max(0, stop - max(start, first)) * self.profile.steady.yields_bytes

    def _retained(self) -> tuple[int, int, str]:
        group, whole = self.profile.steady, self.profile.steady.whole
        beyond = self.window > (self.plan.block or self.count)
        extra = (whole.retained_bytes if beyond else whole.pull_bytes) - whole.graph_bytes
        if self.window == 1 or not beyond:
            extra -= group.state_bytes  # nothing enters the last group from above
        return self._graphs() + extra, 0, _backward(group)

    def _graphs(self) -> int:
        """Of a window, with what waits for it."""
        start, first = self.count - self.window, len(self.profile.first)
        graphs = sum(self.group(i).whole.graph_bytes for i in range(start, min(self.count, first)))
        graphs += max(0, self.count - max(start, first)) * self.profile.steady.whole.graph_bytes
        if self.one_graph:  # a state that no operator saves is let go; the graph of a group holds it
            return graphs - self.states(start + 1, self.count + 1)
        if self.window == self.count:
            graphs -= self.group(self.count).state_bytes
        return graphs + self.group(start).state_bytes + self.yields(start, self.count)

    def _kept(self) -> int:
        """States of a window, with the one that enters the next window and the adjoint of one."""
        start, state = self.count - self.window, self.profile.steady.state_bytes
        kept = self.states(max(1, start), self.count)
        every = self.plan.every or 1
        if every > 1:
            kept -= max(0, self.count - ceil(self.count / every) - min(every, self.count)) * state
        if self.window == self.count:
            return kept
        return kept + state * (2 if self.plan.distance else 1)

    def _recomputed(self) -> tuple[int, int, str]:
        group, offload, kept = self.profile.steady, self.plan.offload, self._kept()
        waiting = self.yields(self.count - self.window, self.count) if self.around.streams or offload else 0
        if not self.plan.pieces:
            device, moment, inputs = group.whole.pull_bytes, _backward(group), 0
            if offload:
                device += 2 * group.state_bytes if self.window > 2 else 0
            elif self.window > 1:
                device -= group.state_bytes  # one is let go while its adjoint comes in
        else:
            device, moment, inputs = self._by_pieces(group)
        if offload:
            return device, kept + waiting + inputs, moment
        return device + kept + waiting, 0, moment

    def _by_pieces(self, group: GroupProfile) -> tuple[int, str, int]:
        """On the device, the piece at the peak, and the features that wait with the adjoint of the state."""
        pieces = group.pieces
        peaks: list[tuple[int, str]] = []
        features, adjoint, most = 0, 0, 0
        for k, piece in enumerate(pieces):
            before = pieces[k - 1].state_bytes if k else 0
            after = pieces[k + 1].state_bytes if k + 1 < len(pieces) else 0
            if self.plan.offload:
                alone = piece.entering_bytes + piece.state_bytes + piece.pull_bytes
                alone += (_fetched(pieces[k - 1], piece) if k else 0) + before
                both = [alone + before + after] if self.window > 2 else []
                # Nothing enters the last group of a window from above, and nothing leaves its first.
                ends = [alone + after - piece.state_bytes, alone + before - piece.state_bytes]
                if self.window == 1:
                    ends = [alone - 2 * piece.state_bytes]
                device = max(both + ends)
            else:
                device = group.takes_bytes + features + piece.pull_bytes + group.state_bytes - 2 * piece.state_bytes
            peaks.append((device, f"{piece.name}, backward"))
            most = max(most, features + sum(p.state_bytes for p in pieces[k + 1 :]))
            features += piece.made_bytes
        return *max(peaks), most

    def _before_loss(self) -> int:
        """On the device when the loss is asked for."""
        if not self.plan.recompute:
            return self._graphs()
        if not self.around.streams:
            return 0 if self.plan.offload else self._kept()
        group = self.profile.steady
        kept = 0 if self.plan.offload else self._kept() + self.yields(self.count - self.window, self.count - 1)
        if not self.plan.pieces:
            return kept + group.whole.graph_bytes
        return kept + group.yields_bytes + (0 if self.plan.offload else sum(p.made_bytes for p in group.pieces[:-1]))


def _fetched(before: PieceProfile, piece: PieceProfile) -> int:
    """Features that the piece which comes next in the sweep needs and that are not there yet."""
    return before.entering_bytes - (piece.entering_bytes - before.made_bytes)


def _backward(group: GroupProfile) -> str:
    return f"{group.moments[2]}, backward"
