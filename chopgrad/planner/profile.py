"""One frame group of full size, followed piece by piece on tensors without data: what formulas are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chopgrad.graph import Graph
from chopgrad.local import Local
from chopgrad.pieces.plain import written_forward
from chopgrad.planner.in_strips import Entering, InStrips
from chopgrad.planner.ledger import Ledger, Works
from chopgrad.planner.piece_names import Names
from chopgrad.recurrence import Features, Group, Piece, Recurrence, tiling
from chopgrad.shapes import META, signature

LONGEST_START = 12
"""Groups after which a state is taken to be of full size."""


@dataclass(frozen=True)
class Swept:
    """A part of a group between detached leaves: run without a graph, run with one, and pulled back.

    Every peak is what is alive beyond the features and the state that enter.

    Attributes:
        forward_bytes: peak without a graph; what leaves is in it.
        graph_bytes: what the graph keeps, with what leaves.
        build_bytes: peak while the graph is built.
        adjoint_bytes: of the adjoints that enter from above and from the next group.
        pull_bytes: peak while it is pulled back and freed, adjoints included.
        retained_bytes: the same where the graph is kept for another call.
        cut_bytes: as ``pull_bytes``, where the adjoint of the state that enters is not asked for.
        forward, build, pull: the work of each.
    """

    forward_bytes: int
    graph_bytes: int
    build_bytes: int
    adjoint_bytes: int
    pull_bytes: int
    retained_bytes: int
    cut_bytes: int
    forward: Works
    build: Works
    pull: Works


NOTHING = Swept(0, 0, 0, 0, 0, 0, 0, Works(), Works(), Works())


@dataclass(frozen=True)
class PieceProfile(Swept):
    """One piece of a group.

    Attributes:
        name: where it is in the model, such as "up_blocks.3.resnets.0, second half".
        entering_bytes, leaving_bytes: features, each storage once.
        made_bytes: of what leaves, that which this piece has made: the rest travels past it.
        state_bytes: its slice of the state.
        beside: share of its main features that is run beside a strip on either side; -1: it is not local in space.
        scale: rows of what it makes for each row of these.
    """

    name: str
    entering_bytes: int
    leaving_bytes: int
    made_bytes: int
    state_bytes: int
    beside: float
    scale: int


@dataclass(frozen=True)
class GroupProfile:
    """One group.

    Attributes:
        takes_bytes: of the source that it takes.
        yields_bytes: of what it yields.
        state_bytes: of the state that enters.
        whole: the group as one part.
        pieces: its pieces; none where the model is not composed.
        moments: names of the pieces at the peaks of ``whole``: forward, build, pull.
        in_strips: its backward pass by strips; None where the model is not composed.
    """

    takes_bytes: int
    yields_bytes: int
    state_bytes: int
    whole: Swept
    pieces: tuple[PieceProfile, ...]
    moments: tuple[str, str, str]
    in_strips: InStrips | None


@dataclass(frozen=True)
class Profile:
    """The groups of one video: those at the beginning, and the one that all later ones are like.

    Attributes:
        weight_bytes: of the parameters that a step uses.
        source_bytes: of what the model runs on.
        groups: how many there are.
        first: those before ``steady`` where they were asked for.
        steady: a group of full size with a state of full size.
        steady_index: its number.
    """

    weight_bytes: int
    source_bytes: int
    groups: int
    first: tuple[GroupProfile, ...]
    steady: GroupProfile
    steady_index: int


def profile(
    model: Recurrence,
    source_size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    source_needs_grad: bool = True,
    batch: int = 1,
    beginning: bool = False,
) -> Profile:
    """Follow the first group of full size, whose state is of full size, without data.

    Args:
        model: on any device; it is copied to meta without its data and left as it is.
        source_size: length, height and width of what it takes: of a decoder latents, of an encoder frames.
        dtype: of the source.
        source_needs_grad: whether the gradient of the source is wanted; of parameters it is where they require it.
        beginning: profile the groups before it too, for formulas that hold for short videos.

    Cost: under a second for a published decoder at any size, twice that with ``checkpoint="frame"`` or ``beginning``.

    Raises:
        ValueError: the model cannot run on that many.
    """
    twin = model if _is_on_meta(model) else on_meta(model)
    length, *size = source_size
    groups = tiling(twin, length)
    source = torch.empty(batch, twin.source_channels, length, *size, dtype=dtype, device=META)
    with torch.no_grad(), torch.device(META):
        tracer = _Tracer(twin, source, groups, source_needs_grad)
        states = [twin.initial_state()]
        seen: list[Any] = []
        for i, group in enumerate(groups):
            seen.append((signature(tuple(tree_leaves(states[i]))), group.takes.stop - group.takes.start,
                         group.yields.stop - group.yields.start))  # fmt: skip
            if (i and seen[i] == seen[i - 1]) or i == LONGEST_START:
                break
            if i + 1 < len(groups):
                states.append(tracer.next_state(i, states[i]))
        steady = len(seen) - 1 - (len(seen) > 1 and seen[-1] == seen[-2])
        # The last group may be shorter than those before it, which then are the rule.
        full = tracer.group(steady, states[steady])
        first = tuple(tracer.group(i, states[i], full) for i in range(steady)) if beginning else ()
        weights = sum(p.nbytes for p in twin.parameters())
        return Profile(weights, source.nbytes, len(groups), first, full, steady)


class _Tracer:
    def __init__(self, model: Recurrence, source: Tensor, groups: Sequence[Group], source_needs_grad: bool) -> None:
        self.source, self.groups, self.source_needs_grad = source, groups, source_needs_grad
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rows = source.shape[-2] // model.row_unit
        self.blocks = model.lean_blocks() if model.is_composed else []
        self.pieces = [piece for block in self.blocks for unit in block for piece in unit]
        self.names = Names(model, self.blocks)
        self.ledger = Ledger()
        self.model = copy(model)
        if self.pieces:
            marked = iter([self._marked(k, piece) for k, piece in enumerate(self.pieces)])
            blocks = [[[next(marked) for _ in unit] for unit in block] for block in self.blocks]
            self.model.blocks = lambda: blocks  # type: ignore[method-assign]

    def taken(self, i: int) -> Tensor:
        return self.source[:, :, self.groups[i].takes].clone()  # so that its size is not the whole source's

    def next_state(self, i: int, state: Any) -> Any:
        with self.ledger:
            return self.model.step(self.taken(i), state)[1]

    def group(self, i: int, state: Any, full: GroupProfile | None = None) -> GroupProfile:
        """Args:
        full: one of full size. The pieces of a smaller group have no peaks that matter, and are not swept.
        """

        def step(features: Features, state: Any) -> tuple[Features, Any]:
            y, state = self.model.step(features[0], state)
            return (y,), state

        taken, yielded = self.taken(i), 0
        self.ledger.at = -1
        whole, moments = self._swept(step, (taken,), state, self.source_needs_grad), self._moments
        smaller = full is not None and whole.pull_bytes <= full.whole.pull_bytes
        found: list[tuple[Swept, dict[str, Any]]] = []
        features: Features = (taken,)
        before: Features = ()
        entering = []
        for k, piece in enumerate(self.pieces):
            space = self._space(piece, features[0])
            tracked = k > 0 or self.source_needs_grad
            swept = NOTHING if smaller else self._swept(piece, features, state[k], tracked)
            with self.names.watching(k), self.ledger:  # by hooks, around which no module would be stood in for
                leaving, _ = piece(features, state[k])
            made = _bytes(leaving, beside=features)
            entering.append(Entering(piece, features, state[k], swept.pull_bytes, _bytes(leaving)))
            sizes = {"entering_bytes": _bytes(features), "leaving_bytes": _bytes(leaving), "made_bytes": made}
            found.append((swept, sizes | space | {"state_bytes": _dense_bytes(state[k])}))
            before, features = features, leaving
            yielded = made
        del before
        pieces = tuple(
            PieceProfile(**vars(swept), name=self.names[k], **sizes) for k, (swept, sizes) in enumerate(found)
        )
        run, built, pulled = ("step" if k < 0 else self.names[k] for k in moments)
        strips = InStrips(entering, self.rows, self.parameters, self.source_needs_grad) if entering else None
        return GroupProfile(taken.nbytes, yielded, _dense_bytes(state), whole, pieces, (run, built, pulled), strips)

    def _space(self, piece: Piece, x: Tensor) -> dict[str, float]:
        if not isinstance(piece, Local):
            return {"beside": -1.0, "scale": 1}
        return {"beside": piece.radius / x.shape[-2], "scale": piece.scale}

    def _swept(self, piece: Piece, features: Features, state: Any, tracked: bool) -> Swept:
        with self.ledger as ledger:
            ledger.begin()
            start, moments = ledger.live, []
            out = piece(features, state)
            forward_bytes, forward = ledger.peak - start, ledger.works
            moments.append(ledger.moment)
            del out
            ledger.begin()
            graph = Graph.of(piece, features, state, tracked)
            build_bytes, build, graph_bytes = ledger.peak - start, ledger.works, ledger.live - start
            moments.append(ledger.moment)
            of_outputs, of_carry = (
                [torch.empty_like(x) if isinstance(x, Tensor) else None for x in xs]
                for xs in (graph.outputs, graph.carry_out)
            )
            adjoint_bytes = ledger.live - start - graph_bytes
            peaks = []
            for carry, retain in ((True, True), (True, False), (False, False)):
                if not carry:
                    ledger.begin()
                    del graph
                    graph = Graph.of(piece, features, state, tracked)
                ledger.begin()
                graph.pull(
                    of_outputs, of_carry, features=tracked, parameters=self.parameters, carry=carry, retain=retain
                )
                peaks.append(ledger.peak - start)
                if carry:
                    moment, pull = ledger.moment, ledger.works
            moments.append(moment)
        self._moments = moments
        retained, pulled, cut = peaks
        return Swept(
            forward_bytes=forward_bytes, graph_bytes=graph_bytes, build_bytes=build_bytes,
            adjoint_bytes=adjoint_bytes, pull_bytes=pulled, retained_bytes=retained,
            cut_bytes=cut, forward=forward, build=build, pull=pull,
        )  # fmt: skip

    def _marked(self, k: int, piece: Piece) -> Piece:
        """The piece, which tells the ledger that it runs, and when its backward pass begins."""

        def mark(adjoint: Tensor | None = None) -> None:
            self.ledger.at = k

        def marked(features: Features, state: Any) -> tuple[Features, Any]:
            mark()
            features, state = piece(features, state)
            if features[0].requires_grad:
                features[0].register_hook(mark)
            return features, state

        return marked


def _bytes(tree: Any, beside: Any = ()) -> int:
    """Of a tree's tensors, each storage once, those of ``beside`` not at all."""
    known = {id(x.untyped_storage()) for x in tree_leaves(beside) if isinstance(x, Tensor)}
    found = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return sum(size for key, size in found.items() if key not in known)


def _dense_bytes(tree: Any) -> int:
    """Of a tree's tensors where each is in memory of its own, as on the host."""
    return sum({id(x): x.nbytes for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def on_meta(model: Recurrence) -> Recurrence:
    """A copy whose tensors have no data; the model and its VAE stay as they are, and nothing is copied.

    What somebody put around a module (hooks, offloading, a forward of his own) is not called: it may hold other models,
    move them, or record what it sees. A hook that does nothing stands for it, so that the module is not stood in for.
    """
    memo: dict[int, Any] = {}
    around: list[nn.Module] = []
    for module in model.vae.modules():
        if written_forward(module) is None:
            around.append(module)
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif name in _AROUND:
                memo[id(value)] = None
        for x in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(x, Tensor) and id(x) not in memo:
                twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
                memo[id(x)] = nn.Parameter(twin, x.requires_grad) if isinstance(x, nn.Parameter) else twin
    copied = deepcopy(model, memo)
    for module in copied.vae.modules():
        for name in _AROUND:
            vars(module).pop(name, None)
    for module in around:
        memo[id(module)].register_forward_pre_hook(lambda *_: None)
    return copied


_AROUND = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook")
"""Attributes by which accelerate and diffusers put something around a module."""


def _is_on_meta(model: Recurrence) -> bool:
    return all(x.is_meta for x in model.vae.parameters())
