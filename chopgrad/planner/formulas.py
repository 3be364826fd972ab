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


def need(strategy: Strategy, profile: Profile, around: Surroundings, follow: bool = True) -> Need:
    """Peaks on the device (weights and source included) and on the host.

    Args:
        follow: strips piece by piece, which takes up to some seconds; False: estimate them.

    Accuracy: against the sweeping planner within 5 % on the device and on the host, for the published and the embedded
    decoders of ``tests/chopgrad/test_formulas.py``.
    """
    return _Video(strategy.plan(), profile, around, isinstance(strategy, Full), follow).need()


def windows(plan: Plan, groups: int) -> list[tuple[int, int, int]]:
    """(a, b, end): gradients are kept for groups a .. b - 1, and the losses of a .. end - 1 are swept back."""
    block = plan.block or groups
    starts = range(0, groups, block)
    return [(a, min(a + block, groups), min(a + block + plan.distance, groups)) for a in starts]


class _Video:
    def __init__(self, plan: Plan, profile: Profile, around: Surroundings, one_graph: bool, follow: bool) -> None:
        self.plan, self.profile, self.around, self.follow = plan, profile, around, follow
        self.one_graph = one_graph and not around.streams
        self.count = profile.groups

    def need(self) -> Need:
        resident, around = self.profile.weight_bytes + self.profile.source_bytes, self.around
        found = [p for window in self._windows() for p in self._peaks(*window)]
        device, moment = max((p[0], p[2]) for p in found)
        in_loss = max(self._before_loss(*window) for window in self._windows()) + around.loss_bytes
        device, moment = max((device + around.gradient_bytes + around.held_bytes, moment), (in_loss, "the loss"))
        return Need(resident + device, max(p[1] for p in found), moment)

    def _windows(self) -> list[tuple[int, int, int]]:
        """Those that differ."""
        found, first = windows(self.plan, self.count), len(self.profile.first) + 2
        return found if len(found) < 2 * first else [*found[:first], *found[-2 - self.plan.distance :]]

    def group(self, i: int) -> GroupProfile:
        first = self.profile.first
        return first[i] if i < len(first) else self.profile.steady

    def state(self, i: int) -> int:
        """Bytes of the state that enters group i; none enters the first, and none leaves the last."""
        return self.group(i).state_bytes if 0 < i < self.count else 0

    def _sum(self, name: str, start: int, stop: int) -> int:
        first = len(self.profile.first)
        some = sum(getattr(self.group(i), name) for i in range(start, min(stop, first)))
        return some + max(0, stop - max(start, first)) * getattr(self.profile.steady, name)

    def _peaks(self, a: int, b: int, end: int) -> list[tuple[int, int, str]]:
        """(device, host, moment) of the groups of one window that differ."""
        if not self.plan.recompute:
            return [self._retained(a, b, end)]
        groups = sorted({end - 1, max(a, end - 2), *range(a, min(len(self.profile.first), end))})
        found = [self._with_graphs(a, b, end)] if self.plan.graphs else []
        for i in groups:
            if self.plan.strips:
                found += self._of_strips(i, a, b, end)
            elif self.plan.pieces:
                found += self._of_pieces(i, a, b, end)
            else:
                found.append(self._of_group(i, a, b, end))
        return found

    def _graphs(self, a: int, end: int) -> int:
        """Of a window, with what waits for it."""
        graphs = sum(self.group(i).whole.graph_bytes for i in range(a, min(end, len(self.profile.first))))
        graphs += max(0, end - max(a, len(self.profile.first))) * self.profile.steady.whole.graph_bytes
        if self.one_graph:  # a state that no operator saves is let go; the graph of a group holds it
            return graphs - self._sum("state_bytes", a + 1, end + 1) - self._sum("yields_bytes", a, end)
        if end == self.count:
            graphs -= self.group(end).state_bytes
        return graphs + self.state(a) + (self._sum("yields_bytes", a, end) if self.around.streams else 0)

    def _retained(self, a: int, b: int, end: int) -> tuple[int, int, str]:
        last = self.group(end - 1)
        pulled = (
            last.whole.retained_bytes if end > b else last.whole.cut_bytes if end == a + 1 else last.whole.pull_bytes
        )
        if end - b < 2:  # no graph is kept into which an adjoint of the state comes
            pulled -= self.group(end).state_bytes
        return self._graphs(a, end) + pulled - last.whole.graph_bytes, 0, _backward(last)

    def _kept(self, i: int, a: int, b: int, end: int) -> int:
        """States that wait while group i is swept, its own among them."""
        stays = not self.around.streams and self.plan.block is None  # autograd holds them
        kept = self._sum("state_bytes", max(1, a), end) + (self.state(end) if end < self.count else 0)
        every = self.plan.every or 1
        if every > 1:
            alive = ceil(self.count / every) + min(every, self.count)
            kept -= max(0, self.count - alive) * self.profile.steady.state_bytes
        return kept if stays else kept - self._sum("state_bytes", i + 1, max(i + 1, min(b, end)))

    def _waiting(self, a: int, end: int) -> int:
        """Adjoints of frames; with a whole video's loss those on the device are a part of what it holds."""
        if self.around.streams:
            return self._sum("yields_bytes", a, end)
        return self._sum("yields_bytes", a, self.count) if self.plan.offload else 0

    def _of_group(self, i: int, a: int, b: int, end: int) -> tuple[int, int, str]:
        group, kept, waiting = self.group(i), self._kept(i, a, b, end), self._waiting(a, end)
        if self.plan.graphs and i == end - 1:
            return self._with_graphs(a, b, end)
        pulled = group.whole.cut_bytes if i == a else group.whole.pull_bytes
        device = pulled - (self.group(i + 1).state_bytes if i == end - 1 else 0)
        if not self.plan.offload:
            return device + kept + waiting, 0, _backward(group)
        device += group.state_bytes + (self.state(i - 1) if i > a else 0)
        return device, kept + waiting, _backward(group)

    def _of_pieces(self, i: int, a: int, b: int, end: int) -> list[tuple[int, int, str]]:
        group, kept, waiting = self.group(i), self._kept(i, a, b, end), self._waiting(a, end)
        pieces, cut = group.pieces, i == a
        # Adjoints of the state that left this group, which come from the next one.
        above = [p.state_bytes for p in self.group(i + 1).pieces]
        missing = above if i == end - 1 else [0] * len(above)
        above = [x - y for x, y in zip(above, missing, strict=True)]
        found, features = [], 0
        for k, piece in enumerate(pieces):
            made = 0 if cut else sum(p.state_bytes for p in pieces[k + 1 :])
            alone = (piece.cut_bytes if cut else piece.pull_bytes) - missing[k]
            if self.plan.offload:
                device = (piece.entering_bytes if k else 0) + piece.state_bytes + alone
                if k:
                    device += (
                        (_fetched(pieces[k - 1], piece) if k > 1 else 0) + pieces[k - 1].state_bytes + above[k - 1]
                    )
                if not cut and k + 1 < len(pieces):
                    device += pieces[k + 1].state_bytes  # it leaves
                stay = sum(p.made_bytes for p in pieces[: max(0, min(k, self.plan.resident - 1))])
                device += stay
                host = kept + waiting + features - stay + made + sum(above[: k + 1])
            else:
                device, host = kept + waiting + features + alone + made + sum(above[:k]), 0
            found.append((device, host, f"{piece.name}, backward"))
            features += piece.made_bytes
        return found

    def _with_graphs(self, a: int, b: int, end: int) -> tuple[int, int, str]:
        """The last group is swept while the graphs of others wait; each has its state on the device."""
        last, count = self.group(end - 1), min(self.plan.graphs, end - a)
        graphs = sum(self.group(i).whole.graph_bytes for i in range(end - count, end))
        kept, waiting = self._kept(end - 1, a, b, end), self._waiting(a, end)
        pulled = last.whole.cut_bytes if end == a + 1 else last.whole.pull_bytes
        device = graphs + pulled - last.whole.graph_bytes - self.group(end).state_bytes
        if not self.plan.offload:
            return device + kept + waiting, 0, _backward(last)
        return device + self._sum("state_bytes", end - count, end), kept + waiting, _backward(last)

    def _of_strips(self, i: int, a: int, b: int, end: int) -> list[tuple[int, int, str]]:
        """On the device as in the largest group."""
        group = self.group(i)
        largest = max((self.profile.steady, *self.profile.first), key=lambda group: group.whole.pull_bytes)
        strips = largest.in_strips
        assert strips is not None and self.plan.strips is not None
        device, at = (strips.peak if self.follow else strips.estimate)(self.plan.strips, self.plan.offload)
        kept, waiting = self._kept(i, a, b, end), self._waiting(a, end)
        above = [0 if i == end - 1 else p.state_bytes for p in self.group(i + 1).pieces]
        found, features = [], 0
        for k, piece in enumerate(group.pieces):
            made = 0 if i == a else sum(p.state_bytes for p in group.pieces[k + 1 :])
            waits = kept + waiting + features + made + sum(above[: k + 1])
            if self.plan.offload:
                found.append((device, waits, f"{group.pieces[at].name}, backward"))
            elif k == at:
                found.append((device + waits, 0, f"{piece.name}, backward"))
            features += piece.made_bytes
        return found

    def _before_loss(self, a: int, b: int, end: int) -> int:
        """On the device when the loss is asked for."""
        if not self.plan.recompute:
            return self._graphs(a, end) if self.one_graph or self.around.streams else 0
        last = self.group(end - 1)
        kept = 0 if self.plan.offload else self._kept(end - 1, a, b, end)
        if not self.around.streams:
            return kept + self.around.held_bytes // 3
        if not self.plan.offload:
            kept += self._sum("yields_bytes", a, end - 1)
        if not self.plan.pieces:
            return kept + last.whole.graph_bytes + (last.state_bytes if self.plan.offload else 0)
        return kept + last.yields_bytes + (0 if self.plan.offload else sum(p.made_bytes for p in last.pieces[:-1]))


def _fetched(before: PieceProfile, piece: PieceProfile) -> int:
    """Features that the piece which comes next in the sweep needs and that are not there yet."""
    return before.entering_bytes - (piece.entering_bytes - before.made_bytes)


def _backward(group: GroupProfile) -> str:
    return f"{group.moments[2]}, backward"
