"""The one engine: a forward pass over frame groups, and reverse sweeps that carry the adjoint of the state backwards.

Frame groups are cut into blocks [a, b). For each block the losses of groups a .. min(b + D, T) - 1 are swept from last
to first; gradients are kept for the latents and parameters of groups a .. b - 1 only, and the adjoint is cut at a. All
strategies are this loop with other settings.

A group is a chain of stages, ``(features, state slice) -> (features, state slice)``, the last of which gives the loss:
one stage of everything, or, walked piece by piece, the decoder's pieces and then the loss. In the second case the sweep
goes over a grid, groups times pieces: the graph of one piece exists at a time, and with offloading the slices of the
state and of its adjoint visit the device one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from chopgrad.decoders.base import CausalDecoder, Features, FrameGroup
from chopgrad.memory import affordable_every
from chopgrad.offload import Waiting, WaitingRoom, saved_on_host
from chopgrad.strategies import Plan

GroupLoss = Callable[[int, Tensor, Any], tuple[Tensor, Any]]
"""(group index, frames, context) -> (scalar loss of the group, context for the next group)."""

Stage = Callable[[Features, Any], tuple[Features, Any]]
Carry = list[Any]
"""What one group hands to the next: for each stage its slice of the state (the loss's is its context)."""
Adjoint = list[Any]
"""For each stage the adjoints of its slice's leaves; None where there is none."""


@dataclass
class Graph:
    """The graph of one stage between detached leaves."""

    features: list[Tensor]
    carry_in: list[Any]
    outputs: Features
    carry_out: list[Any]
    spec: TreeSpec


@dataclass
class Kept:
    """What waits for a backward pass, by frame group."""

    carries: dict[int, Carry]
    """``carries[i]`` enters group i; kept for recomputation."""
    graphs: dict[int, Graph] = field(default_factory=dict)
    """Of whole groups."""
    inputs: dict[int, list[Features]] = field(default_factory=dict)
    """What enters each stage of the group that is swept first."""


@dataclass
class Gradients:
    """Result of a sweep: the loss of each group, and the summed gradients of latents and parameters."""

    losses: list[Tensor]
    latents: Tensor | None
    parameters: list[Tensor]


class Sweep:
    """One evaluation of the loss and its (possibly truncated) gradient.

    Args:
        decoder: the recurrence.
        groups: its frame groups for these latents.
        group_loss: loss of one group.
        plan: block, distance, recompute, offload, every, pieces.
        latents: [batch, channels, latent_frames, h, w]; read, never written.
        latents_need_grad: whether the gradient of the latents is wanted.
        parameters: decoder parameters whose gradient is wanted.
        seeds: weight of each group's loss in the total; the adjoint each sweep starts from. Groups after the last whose
            weight is not zero are not decoded, and no graph is built where no such group is in reach.
        first: first group whose gradient is wanted; the adjoint is cut there.
    """

    def __init__(
        self,
        decoder: CausalDecoder,
        groups: Sequence[FrameGroup],
        group_loss: GroupLoss,
        plan: Plan,
        latents: Tensor,
        latents_need_grad: bool,
        parameters: Sequence[Tensor],
        seeds: Sequence[float],
        first: int = 0,
    ) -> None:
        self.scored = [i for i, seed in enumerate(seeds) if seed]
        self.decoder, self.groups, self.group_loss = decoder, groups[: self.scored[-1] + 1], group_loss
        self.latents, self.latents_need_grad = latents, latents_need_grad
        self.parameters, self.seeds, self.first, self.plan = list(parameters), seeds, first, plan
        self.block = plan.block or len(self.groups) - first
        self.every = plan.every or 1
        self.room = WaitingRoom(latents.device, plan.offload and plan.recompute)
        self.saved = WaitingRoom(latents.device, plan.offload and not plan.recompute)

    def values(self) -> list[Tensor]:
        """The loss of each group, without any gradient; memory of one state."""
        losses = []
        with self.room:
            carry = self._initial_carry()
            for i in range(len(self.groups)):
                loss, carry = self._forward(i, carry)
                losses.append(loss)
        return losses

    def gradients(self) -> Gradients:
        """The loss of each group, and the gradients that the plan keeps."""
        with self.room, self.saved:
            return self._gradients()

    def _gradients(self) -> Gradients:
        count = len(self.groups)
        result = Gradients(
            losses=[],
            latents=torch.zeros_like(self.latents) if self.latents_need_grad else None,
            parameters=[torch.zeros_like(p) for p in self.parameters],
        )
        kept = Kept({0: self._initial_carry()})
        for a in range(self.first, count, self.block):
            b = min(a + self.block, count)
            end = min(b + self.plan.distance, count)
            start = max((i for i in self.scored if a <= i < end), default=None)  # the sweep begins at the last loss
            for i in range(len(result.losses), end):
                # When recomputing, the group that is swept first is swept at once, so that it need not run again.
                swept = self._in_reach(i) if not self.plan.recompute else i == start == end - 1
                result.losses.append(self._advance(i, a, swept, kept))
            self.room.clear()
            if start is not None:
                self._reverse(a, b, start, kept, result)
        return result

    @property
    def _whole(self) -> bool:
        return not self.plan.pieces

    def _in_reach(self, i: int) -> bool:
        """Whether a loss is swept back to group i for its own gradient (if not, then neither for an earlier one's)."""
        if i < self.first:
            return False
        last = self.first + ((i - self.first) // self.block + 1) * self.block - 1 + self.plan.distance
        return any(i <= j <= last for j in self.scored)

    def _advance(self, i: int, a: int, swept: bool, kept: Kept) -> Tensor:
        """Run group i, leave its outgoing carry for later, and return its loss.

        What a group that will be ``swept`` without running again needs is left too: its graph, or its stages' inputs.
        """
        carries = kept.carries
        if i == 2 and self.plan.every is None:
            self.every = self._affordable_every(carries[i])  # the first carry of full size
        # A state that is not kept is rebuilt from the last one that is, so only this group needed it.
        keep = self.plan.recompute and self._in_reach(i) and (i == min(carries) or (i - a) % self.every == 0)
        carry_in = carries[i] if keep else carries.pop(i)
        if swept and self._whole:
            (stage,) = self._stages(i)
            state = self.room.get(carry_in[0])
            kept.graphs[i] = graph = self._graph(stage, (self._latent(i),), state, self.latents_need_grad)
            loss = graph.outputs[0].detach()
            carry = [self.room.put(tree_unflatten([_detached(x) for x in graph.carry_out], graph.spec))]
        else:
            inputs: list[Features] = []
            loss, carry = self._forward(i, carry_in, inputs if swept else None)
            if swept:
                kept.inputs[i] = inputs
        if i + 1 < len(self.groups):
            carries[i + 1] = carry
        return loss

    def _reverse(self, a: int, b: int, start: int, kept: Kept, result: Gradients) -> None:
        room, graphs, carries = self.room, kept.graphs, kept.carries
        adjoint: Adjoint | None = None
        for i in range(start, a - 1, -1):
            in_block, cut = i < b, i == a
            carry: Carry = [None] if i in graphs else self._carry(i, carries)
            inputs = kept.inputs.pop(i, None) or self._stage_inputs(i, carry)
            if self._whole and not cut:
                room.fetch(carries.get(i - 1))
            stages = self._stages(i)
            before: Adjoint = [[] for _ in stages]
            seeds: list[Tensor | None] = [self._seed(i)]
            for k in reversed(range(len(stages))):
                features, state = room.get(inputs.pop()), room.get(carry[k])
                after = room.get(adjoint[k]) if adjoint else []
                if adjoint:
                    adjoint[k] = []
                if k:
                    room.fetch([inputs[-1], carry[k - 1], adjoint[k - 1] if adjoint else None])
                tracked = k > 0 or self.latents_need_grad
                graph = graphs.pop(i, None) or self._graph(stages[k], features, state, tracked)
                del features, state
                retain = not in_block and not self.plan.recompute
                if retain:
                    graphs[i] = graph
                is_latent = k == 0
                seeds, before_k = self._pull(graph, seeds, after, is_latent, in_block, cut, retain, result)
                if is_latent and in_block and result.latents is not None and seeds[0] is not None:
                    result.latents[:, :, self.groups[i].latents] = seeds[0]
                before[k] = before_k if self._whole else room.put(before_k)
                del graph, after, before_k  # before the next graph is built
            adjoint = before
            if in_block:
                carries.pop(i, None)  # no later block starts before b
        room.clear()

    def _carry(self, i: int, carries: dict[int, Carry]) -> Carry:
        """The carry that enters group i: kept, or rebuilt from the last one kept before it."""
        if i not in carries:
            start = max(j for j in carries if j < i)
            for j in range(start, i):
                _, carries[j + 1] = self._forward(j, carries[j])
        return carries[i]

    def _affordable_every(self, carry: Carry) -> int:
        if self.latents.is_meta:  # memory is being predicted, for another machine
            return 1
        tensors = [x.host if isinstance(x, Waiting) else x for x in tree_leaves(carry)]
        size = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return affordable_every(len(self.groups), size, "cpu" if self.room.enabled else self.latents.device)

    def _stages(self, i: int) -> list[Stage]:
        """What group i runs: everything at once, or the decoder's pieces and then the loss."""

        def loss(features: Features, context: Any) -> tuple[Features, Any]:
            value, context = self.group_loss(i, features[0], context)
            return (value,), context

        def everything(features: Features, carry: Any) -> tuple[Features, Any]:
            state, context = carry
            frames, state = self.decoder.step(features[0], state)
            features, context = loss((frames,), context)
            return features, (state, context)

        return [everything] if self._whole else [*self.decoder.pieces(), loss]

    def _initial_carry(self) -> Carry:
        state = self.decoder.initial_state()
        return self.room.put([(state, None)] if self._whole else [*state, None])

    def _latent(self, i: int) -> Tensor:
        return self.latents[:, :, self.groups[i].latents]

    def _seed(self, i: int) -> Tensor | None:
        return torch.tensor(self.seeds[i], dtype=torch.float64) if self.seeds[i] else None

    def _forward(
        self, i: int, carry: Carry, inputs: list[Features] | None = None, with_loss: bool = True
    ) -> tuple[Tensor, Carry]:
        """Run group i without graphs: its loss, and the carry that enters the next group.

        Args:
            inputs: is given the features that enter each stage; of a single stage, its latent. They wait where the
                state waits.
            with_loss: False: stop before the last stage, and pass on no carry.
        """
        features: Features = (self._latent(i),)
        if inputs is not None:
            inputs.append(features)
        stages = self._stages(i)
        onward = with_loss and i + 1 < len(self.groups)
        after: Carry = []
        with torch.no_grad():
            for k, stage in enumerate(stages if with_loss else stages[:-1]):
                entering, state = features, self.room.get(carry[k])
                self.room.fetch(carry[k + 1 : k + 2])
                features, new = stage(entering, state)
                after.append(self.room.put(new) if onward else None)
                if inputs is not None and k + 1 < len(stages):
                    inputs.append(self._waiting(features, dict(zip(map(id, entering), inputs[-1], strict=True))))
                del entering, state, new
        return features[0], after

    def _stage_inputs(self, i: int, carry: Carry) -> list[Features]:
        inputs: list[Features] = []
        self._forward(i, carry, inputs, with_loss=False)
        return inputs

    def _waiting(self, features: Features, waiting: dict[int, Any]) -> Features:
        """Features on their way to where they wait; a stage may have passed on some that wait already."""
        new = [x for x in features if id(x) not in waiting]
        waiting |= dict(zip(map(id, new), self.room.put(new), strict=True))
        return tuple(waiting[id(x)] for x in features)

    def _graph(self, stage: Stage, features: Features, carry: Any, tracked: bool) -> Graph:
        """Run a stage on detached leaves, with a graph of its own that ends at them."""
        leaves, spec = tree_flatten(carry)
        carry_in = [_leaf(x) for x in leaves]
        inputs = [_leaf(x) if tracked else x.detach() for x in features]
        on_host = saved_on_host(self.saved, self.decoder.parameters()) if self.saved.enabled else nullcontext()
        with torch.enable_grad(), on_host:
            outputs, after = stage(tuple(inputs), tree_unflatten(carry_in, spec))
        carry_out, spec = tree_flatten(after)
        return Graph(inputs, carry_in, outputs, carry_out, spec)

    def _pull(
        self,
        graph: Graph,
        seeds: Sequence[Tensor | None],
        after: Sequence[Tensor | None],
        is_latent: bool,
        in_block: bool,
        cut: bool,
        retain: bool,
        result: Gradients,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """One stage's vector-Jacobian product: adjoints of what leaves it -> adjoints of its features and its slice."""
        outputs, adjoints = [], []
        for x, seed in [*zip(graph.outputs, seeds, strict=True), *zip(graph.carry_out, after, strict=False)]:
            if seed is not None and isinstance(x, Tensor) and x.requires_grad:
                outputs.append(x)
                adjoints.append(seed.to(x))
        wanted_features = graph.features if not is_latent or (in_block and self.latents_need_grad) else []
        wanted_parameters = self.parameters if in_block else []
        tracked = [isinstance(x, Tensor) and x.requires_grad for x in graph.carry_in]
        wanted_carry = [] if cut else [x for x, t in zip(graph.carry_in, tracked, strict=True) if t]
        inputs = [*wanted_features, *wanted_parameters, *wanted_carry]
        if not outputs or not inputs:
            return [None] * len(graph.features), []
        with _no_autocast(self.latents.device.type):
            gradients = iter(torch.autograd.grad(outputs, inputs, adjoints, retain_graph=retain, allow_unused=True))
        of_features: list[Tensor | None] = [next(gradients) for _ in wanted_features]
        for total, _ in zip(result.parameters, wanted_parameters, strict=False):
            if (gradient := next(gradients)) is not None:
                total.add_(gradient)
        return of_features or [None] * len(graph.features), [] if cut else [
            next(gradients) if t else None for t in tracked
        ]


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _no_autocast(device_type: str) -> Any:
    # Backward formulas choose their own precision; PyTorch asks that autocast not be active around them.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
