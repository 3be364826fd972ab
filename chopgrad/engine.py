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

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from chopgrad.decoders.base import CausalDecoder, Features, FrameGroup
from chopgrad.strategies import Plan

GroupLoss = Callable[[int, Tensor, Any], tuple[Tensor, Any]]
"""(group index, frames, context) -> (scalar loss of the group, context for the next group)."""

Stage = Callable[[Features, Any], tuple[Features, Any]]
Carry = list[Any]
"""What one group hands to the next: for each stage its slice of the state (the loss's is its context)."""
Adjoint = list[list[Tensor | None]]
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
        seeds: weight of each group's loss in the total; the adjoint each sweep starts from.
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
    ) -> None:
        self.decoder, self.groups, self.group_loss, self.plan = decoder, groups, group_loss, plan
        self.latents, self.latents_need_grad = latents, latents_need_grad
        self.parameters, self.seeds = list(parameters), seeds

    def values(self) -> list[Tensor]:
        """The loss of each group, without any gradient; memory of one state."""
        carry, losses = self._initial_carry(), []
        for i in range(len(self.groups)):
            loss, carry = self._forward(i, carry)
            losses.append(loss)
        return losses

    def gradients(self) -> Gradients:
        count, plan = len(self.groups), self.plan
        block = plan.block or count
        result = Gradients(
            losses=[],
            latents=torch.zeros_like(self.latents) if self.latents_need_grad else None,
            parameters=[torch.zeros_like(p) for p in self.parameters],
        )
        graphs: dict[int, Graph] = {}  # of whole groups, kept for a later backward pass
        carries: dict[int, Carry] = {0: self._initial_carry()}  # carries[i] enters group i; kept for recomputation
        for a in range(0, count, block):
            b = min(a + block, count)
            end = min(b + plan.distance, count)
            for i in range(len(result.losses), end):
                # When recomputing, the last group of the window is swept at once, so its graph is built right away.
                keep_graph = not plan.recompute or (i == end - 1 and not plan.pieces)
                result.losses.append(self._advance(i, a, keep_graph, graphs, carries))
            self._reverse(a, b, end, graphs, carries, result)
        return result

    def _advance(self, i: int, a: int, keep_graph: bool, graphs: dict[int, Graph], carries: dict[int, Carry]) -> Tensor:
        """Run group i, leave its outgoing carry (and its graph) for later, and return its loss."""
        # A state that is not kept is rebuilt from the last one that is, so only this group needed it.
        kept = self.plan.recompute and (i - a) % self.plan.every == 0
        carry_in = carries[i] if kept else carries.pop(i)
        if keep_graph:
            (stage,) = self._stages(i)
            graphs[i] = graph = self._graph(stage, (self._latent(i),), self._fetch(carry_in[0]), self.latents_need_grad)
            loss = graph.outputs[0].detach()
            carry = [self._stow(tree_unflatten([_detached(x) for x in graph.carry_out], graph.spec))]
        else:
            loss, carry = self._forward(i, carry_in)
        if i + 1 < len(self.groups):
            carries[i + 1] = carry
        return loss

    def _reverse(
        self, a: int, b: int, end: int, graphs: dict[int, Graph], carries: dict[int, Carry], result: Gradients
    ) -> None:
        adjoint: Adjoint | None = None
        for i in range(end - 1, a - 1, -1):
            in_block, cut = i < b, i == a
            if i in graphs:
                carry: Carry = [None]
            else:
                carry = self._carry(i, carries)
            inputs = self._stage_inputs(i, carry)
            stages = self._stages(i)
            before: Adjoint = [[] for _ in stages]
            seeds: list[Tensor | None] = [self._seed(i)]
            for k in reversed(range(len(stages))):
                features = self._fetch(inputs.pop())
                tracked = k > 0 or self.latents_need_grad
                graph = graphs.pop(i, None) or self._graph(stages[k], features, self._fetch(carry[k]), tracked)
                del features
                retain = not in_block and not self.plan.recompute
                if retain:
                    graphs[i] = graph
                after = self._fetch(adjoint[k]) if adjoint else []
                if adjoint:
                    adjoint[k] = []
                is_latent = k == 0
                seeds, before_k = self._pull(graph, seeds, after, is_latent, in_block, cut, retain, result)
                if is_latent and in_block and result.latents is not None and seeds[0] is not None:
                    result.latents[:, :, self.groups[i].latents] = seeds[0]
                before[k] = self._stow(before_k) if self.plan.pieces else before_k
                del graph, after, before_k  # before the next graph is built
            adjoint = before
            if in_block:
                carries.pop(i, None)  # no later block starts before b

    def _carry(self, i: int, carries: dict[int, Carry]) -> Carry:
        """The carry that enters group i: kept, or rebuilt from the last one kept before it."""
        if i not in carries:
            start = max(j for j in carries if j < i)
            for j in range(start, i):
                _, carries[j + 1] = self._forward(j, carries[j])
        return carries[i]

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

        return [*self.decoder.pieces(), loss] if self.plan.pieces else [everything]

    def _initial_carry(self) -> Carry:
        state = self.decoder.initial_state()
        return [*state, None] if self.plan.pieces else [(state, None)]

    def _latent(self, i: int) -> Tensor:
        return self.latents[:, :, self.groups[i].latents]

    def _seed(self, i: int) -> Tensor:
        return torch.tensor(self.seeds[i], dtype=torch.float64)

    def _forward(self, i: int, carry: Carry) -> tuple[Tensor, Carry]:
        features: Features = (self._latent(i),)
        after: Carry = []
        with torch.no_grad():
            for stage, before in zip(self._stages(i), carry, strict=True):
                features, new = stage(features, self._fetch(before))
                after.append(self._stow(new))
                del new
        return features[0], after

    def _stage_inputs(self, i: int, carry: Carry) -> list[Features]:
        """The features that enter each stage; of a single stage, its latent. They wait where the state waits."""
        features: Features = (self._latent(i),)
        inputs = [features]
        with torch.no_grad():
            for stage, before in zip(self._stages(i)[:-1], carry[:-1], strict=True):
                passed_on = {id(x): waiting for x, waiting in zip(features, inputs[-1], strict=True)}
                features, _ = stage(features, self._fetch(before))
                inputs.append(tuple(passed_on[id(x)] if id(x) in passed_on else self._stow(x) for x in features))
        return inputs

    def _graph(self, stage: Stage, features: Features, carry: Any, tracked: bool) -> Graph:
        """Run a stage on detached leaves, with a graph of its own that ends at them."""
        leaves, spec = tree_flatten(carry)
        carry_in = [_leaf(x) for x in leaves]
        inputs = [_leaf(x) if tracked else x.detach() for x in features]
        waits_on_host = self.plan.offload and not self.plan.recompute
        with torch.enable_grad(), _saved_on_host(self.decoder.parameters()) if waits_on_host else nullcontext():
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

    def _stow(self, tree: Any) -> Any:
        return tree_map_only(Tensor, _to_host, tree) if self.plan.offload and self.plan.recompute else tree

    def _fetch(self, tree: Any) -> Any:
        if not (self.plan.offload and self.plan.recompute):
            return tree
        device = self.latents.device
        return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), tree)


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")
    return host.copy_(x, non_blocking=False)


def _saved_on_host(parameters: Iterable[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Keep the activations that a graph saves in host memory; weights stay where they are."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(x: Tensor) -> tuple[torch.device, Tensor]:
        return x.device, x if x.untyped_storage().data_ptr() in weights else _to_host(x)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, x = packed
        return x.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _no_autocast(device_type: str) -> Any:
    # Backward formulas choose their own precision; PyTorch asks that autocast not be active around them.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
