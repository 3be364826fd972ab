"""The one engine: a forward pass over frame groups, and reverse sweeps that carry the adjoint of the state backwards.

Frame groups are cut into blocks [a, b). For each block the losses of groups a .. min(b + D, T) - 1 are swept from last
to first; gradients are kept for the latents and parameters of groups a .. b - 1 only, and the adjoint is cut at a. All
strategies are this loop with other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from chopgrad.decoders.base import CausalDecoder, FrameGroup
from chopgrad.strategies import Plan

GroupLoss = Callable[[int, Tensor, Any], tuple[Tensor, Any]]
"""(group index, frames, context) -> (scalar loss of the group, context for the next group)."""


@dataclass
class Carry:
    """What one group hands to the next: decoder state and loss context, flattened."""

    leaves: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, state: Any, context: Any) -> Carry:
        return cls(*tree_flatten((state, context)))

    def tree(self) -> tuple[Any, Any]:
        return tree_unflatten(self.leaves, self.spec)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Carry:
        return Carry([fn(x) if isinstance(x, Tensor) else x for x in self.leaves], self.spec)

    def detached(self) -> Carry:
        return self.map(Tensor.detach)


@dataclass
class Graph:
    """The graph of one group between detached leaves: (z, carry_in) -> (loss, carry_out)."""

    z: Tensor
    carry_in: Carry
    loss: Tensor
    carry_out: Carry


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
        plan: block, distance, recompute, offload.
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
            losses.append(loss.clone())
        return losses

    def gradients(self) -> Gradients:
        count, plan = len(self.groups), self.plan
        block = plan.block or count
        result = Gradients(
            losses=[],
            latents=torch.zeros_like(self.latents) if self.latents_need_grad else None,
            parameters=[torch.zeros_like(p) for p in self.parameters],
        )
        graphs: dict[int, Graph] = {}  # kept for a later backward pass
        carries: dict[int, Carry] = {0: self._initial_carry()}  # carries[i] enters group i; kept for recomputation
        for a in range(0, count, block):
            b = min(a + block, count)
            end = min(b + plan.distance, count)
            for i in range(len(result.losses), end):
                # When recomputing, the last group of the window is swept at once, so its graph is built right away.
                keep_graph = not plan.recompute or i == end - 1
                result.losses.append(self._advance(i, keep_graph, graphs, carries))
            self._reverse(a, b, end, graphs, carries, result)
        return result

    def _advance(self, i: int, keep_graph: bool, graphs: dict[int, Graph], carries: dict[int, Carry]) -> Tensor:
        """Run group i, leave its outgoing carry (and its graph) for later, and return its loss."""
        carry_in = self._fetch(carries[i]) if self.plan.recompute else carries.pop(i)
        if keep_graph:
            graphs[i] = graph = self._graph(i, carry_in)
            loss, carry = graph.loss.detach(), graph.carry_out.detached()
        else:
            loss, carry = self._forward(i, carry_in)
        if i + 1 < len(self.groups):
            carries[i + 1] = self._stow(carry) if self.plan.recompute else carry
        # A copy: some losses (mse_loss on the CPU) return a scalar in a storage as large as the frames.
        return loss.clone()

    def _reverse(
        self, a: int, b: int, end: int, graphs: dict[int, Graph], carries: dict[int, Carry], result: Gradients
    ) -> None:
        adjoint: list[Tensor | None] | None = None
        for i in range(end - 1, a - 1, -1):
            in_block = i < b
            graph = graphs.pop(i, None) or self._graph(i, self._fetch(carries[i]))
            if in_block:
                carries.pop(i, None)  # no later block starts before b
            elif not self.plan.recompute:
                graphs[i] = graph
            adjoint = self._backward(i, graph, adjoint, in_block, cut=i == a, retain=i in graphs, result=result)

    def _initial_carry(self) -> Carry:
        return Carry.of(self.decoder.initial_state(), None)

    def _forward(self, i: int, carry: Carry) -> tuple[Tensor, Carry]:
        with torch.no_grad():
            state, context = carry.tree()
            frames, state = self.decoder.step(self.latents[:, :, self.groups[i].latents], state)
            loss, context = self.group_loss(i, frames, context)
        return loss, Carry.of(state, context)

    def _graph(self, i: int, carry: Carry) -> Graph:
        """Run group i on detached leaves, with a graph of its own that ends at them."""
        z = self.latents[:, :, self.groups[i].latents].detach().requires_grad_(self.latents_need_grad)
        carry_in = carry.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))
        waits_on_host = self.plan.offload and not self.plan.recompute
        with torch.enable_grad(), _saved_on_host(self.decoder.parameters()) if waits_on_host else nullcontext():
            state, context = carry_in.tree()
            frames, state = self.decoder.step(z, state)
            loss, context = self.group_loss(i, frames, context)
        return Graph(z, carry_in, loss, Carry.of(state, context))

    def _backward(
        self,
        i: int,
        graph: Graph,
        adjoint: list[Tensor | None] | None,
        in_block: bool,
        cut: bool,
        retain: bool,
        result: Gradients,
    ) -> list[Tensor | None] | None:
        """One group's vector-Jacobian product: adjoint of the outgoing carry -> adjoint of the incoming one."""
        outputs, seeds = [], []
        if graph.loss.requires_grad:
            outputs.append(graph.loss)
            seeds.append(torch.full_like(graph.loss, self.seeds[i]))
        for leaf, leaf_adjoint in zip(graph.carry_out.leaves, adjoint or [], strict=False):
            if leaf_adjoint is not None and leaf.requires_grad:
                outputs.append(leaf)
                seeds.append(leaf_adjoint)
        wanted_z = [graph.z] if in_block and self.latents_need_grad else []
        wanted_parameters = self.parameters if in_block else []
        tracked = [isinstance(x, Tensor) and x.requires_grad for x in graph.carry_in.leaves]
        wanted_carry = [] if cut else [x for x, t in zip(graph.carry_in.leaves, tracked, strict=True) if t]
        inputs = [*wanted_z, *wanted_parameters, *wanted_carry]
        if not outputs or not inputs:
            return None
        with _no_autocast(graph.z.device.type):
            gradients = iter(torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain, allow_unused=True))
        for _ in wanted_z:
            if (gradient := next(gradients)) is not None and result.latents is not None:
                result.latents[:, :, self.groups[i].latents] = gradient
        for total, _ in zip(result.parameters, wanted_parameters, strict=False):
            if (gradient := next(gradients)) is not None:
                total.add_(gradient)
        return None if cut else [next(gradients) if t else None for t in tracked]

    def _stow(self, carry: Carry) -> Carry:
        return carry.map(_to_host) if self.plan.offload else carry

    def _fetch(self, carry: Carry) -> Carry:
        device = self.latents.device
        return carry.map(lambda x: x.to(device, non_blocking=True)) if self.plan.offload else carry


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
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
    return torch.autocast(device_type, enabled=False)
