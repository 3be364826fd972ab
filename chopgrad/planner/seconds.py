"""How long a strategy takes, from the work of one group and the rates of a card: a roofline (Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from chopgrad.planner.formulas import windows
from chopgrad.planner.ledger import Works
from chopgrad.planner.profile import GroupProfile, Profile
from chopgrad.strategies import Full, Plan, Strategy


@dataclass(frozen=True)
class Card:
    """A device by its rates.

    Attributes:
        flops_per_second: of its convolutions and products of matrices, a multiplication and an addition being two.
        bytes_per_second: of its memory.
        host_bytes_per_second: to and from the host's memory, one way at a time.
        operator_seconds: the least that an operator takes, however small.
    """

    flops_per_second: float
    bytes_per_second: float
    host_bytes_per_second: float
    operator_seconds: float = 0.0

    def seconds(self, works: Works) -> float:
        """Each operator takes what its FLOPs or its traffic take, whichever is longer."""
        flops, moved, least = 1 / self.flops_per_second, 1 / self.bytes_per_second, self.operator_seconds
        return sum(n * max(work.flops * flops, work.moved_bytes * moved, least) for work, n in works.items())


H200 = Card(3.5e14, 4.0e12, 5.1e10)
"""An NVIDIA H200 in bfloat16. The first is between what Wan's convolutions reach forwards and backwards, the last that
of copies, both measured (results/gpu); that of its memory was not measured but taken from below its data sheet's."""


def seconds(strategy: Strategy, profile: Profile, card: Card, streams: bool = True) -> float:
    """Of a loss and its backward pass; the loss itself is not counted.

    Recomputation is: forward passes without graphs, graphs that are built again, and what ``checkpoint`` computes again
    in a backward pass. By pieces copies to the host and back hide behind the work, by groups they add to it: this rule
    was chosen to agree with the H200's records, so their agreement is no test of it.

    Accuracy: time relative to full back-propagation within 20 % of what was measured (docs/planner.md).
    """
    plan, count = strategy.plan(), profile.groups
    spans = windows(plan, count)
    visits = [sum(a <= i < end for a, _, end in spans) for i in range(count)]
    one_pass = not streams and plan.block is None
    builds = visits if plan.recompute else [1] * count
    forwards: list[float] = [0.0] * count
    if plan.recompute:
        # The decode; where it is followed by the sweep of a window at once, its last group need not run again.
        forwards = [1.0] * count
        runs = list(visits) if plan.pieces else [0] * count
        if not one_pass:
            for _, _, end in spans:
                if plan.pieces:
                    runs[end - 1] -= 1
                else:
                    forwards[end - 1] = 0.0
        forwards = [f + r for f, r in zip(forwards, runs, strict=True)]
    if plan.graphs:  # what is built in the forward pass need not run before
        forwards[-plan.graphs :] = [0.0] * min(plan.graphs, count)
    if not streams and plan.block is not None:
        forwards = [f + 1 for f in forwards]
    if (plan.every or 1) > 1:
        forwards = [f + 1 - 1 / (plan.every or 1) for f in forwards]
    found = 0.0
    for i, (forward, build, visit) in enumerate(zip(forwards, builds, visits, strict=True)):
        group = profile.first[i] if i < len(profile.first) else profile.steady
        work = forward * card.seconds(group.whole.forward) + build * card.seconds(group.whole.build)
        work += visit * card.seconds(group.whole.pull)
        work *= 1 + (_beside(group, plan.strips) if plan.strips else 0.0)
        copies = _moved_bytes(group, plan, visit) / card.host_bytes_per_second if plan.recompute else 0.0
        found += work if not plan.offload else max(work, copies) if plan.pieces else work + copies
    return found


def relative_seconds(strategy: Strategy, profile: Profile, card: Card, streams: bool = True) -> float:
    """As a ratio to full back-propagation, whose profile is the same decoder's without ``checkpoint``."""
    return seconds(strategy, profile, card, streams) / seconds(Full(), profile, card, streams)


def _moved_bytes(group: GroupProfile, plan: Plan, visits: int) -> int:
    """To the host and back: the state, the frames' adjoint, and by pieces features and the adjoint of the state."""
    once = group.state_bytes + group.yields_bytes
    moved = once * (1 + visits)
    if plan.pieces:
        features = sum(p.made_bytes for p in group.pieces[max(0, plan.resident - 1) : -1])
        moved += 2 * visits * (features + group.state_bytes)
    return moved


def _beside(group: GroupProfile, strips: int) -> float:
    """Share of the work that is done for rows beside strips, which the next strip does again."""
    sizes = [p.entering_bytes * p.scale**2 for p in group.pieces]
    rows = [2 * (ceil(strips * size / max(sizes)) - 1) * max(0.0, p.beside) for p, size in zip(group.pieces, sizes)]
    return sum(row * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
