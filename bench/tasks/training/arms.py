"""The arms of an end task: what a loss on pixels is replaced by, or how it is differentiated.

Every arm sees the same clips in the same order for the same number of steps. ``arm.pixel_loss`` is an ordinary
scalar, with gradients for the latents and for decoder parameters that train.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.baselines import Baseline, FirstLatents, differentiate
from chopgrad import CausalDecoder, Chop, Exact, Full, Strategy, frame_loss

LossFn = Callable[[Tensor, Tensor], Tensor]


class Arm(ABC):
    """How an arm trains."""

    pixels: ClassVar[bool] = True
    """Whether it decodes at all."""
    trains_decoder: ClassVar[bool] = True
    """Whether the decoder trains where the task says so, and the arm decodes."""
    of_target: ClassVar[bool] = False
    """Whether what it decodes are the target's latents, and not the restored ones."""

    @abstractmethod
    def pixel_loss(self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
        """Scalar.

        Args:
            latents: [batch, channels, latent frames, h, w] in the VAE's own space.
            target: [batch, 3, frames, H, W] in [-1, 1].
            loss_fn: a mean of per-frame terms.
        """


@dataclass(frozen=True)
class LatentOnly(Arm):
    """Mean squared error of the latents and nothing else: what is usual, and costs no decoding."""

    pixels = False

    def pixel_loss(self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
        return latents.new_zeros(())


@dataclass(frozen=True)
class Strategic(Arm):
    """``frame_loss`` of this library under a strategy."""

    strategy: Strategy

    def pixel_loss(self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
        return frame_loss(decoder, latents, target, loss_fn, self.strategy)


class Frozen(Strategic):
    """A control: the decoder stays as it is."""

    trains_decoder = False


class Tuned(Strategic):
    """A control: latent MSE for the backbone, while the decoder learns to draw the target from the target's latents."""

    of_target = True


@dataclass(frozen=True)
class Rival(Arm):
    """What people do without this library."""

    baseline: Baseline

    def pixel_loss(self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
        z = latents.detach().requires_grad_()
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        with torch.enable_grad():
            value, gradients = differentiate(self.baseline, decoder, z, target, loss_fn, parameters)
        return with_gradients(value, [latents, *parameters], gradients)


@dataclass(frozen=True)
class Isolated(Arm):
    """Each latent decoded on its own, and a loss on frame differences, as DOVE trains.

    Latent k gives one frame, which is compared with the last frame of its group; the frame before it, without a graph,
    makes the difference (squared, against that of the targets). So memory stays that of one latent.

    Attributes:
        difference: weight of the loss on differences.
    """

    difference: float = 1.0

    def pixel_loss(self, decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
        z = latents.detach().requires_grad_()
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        inputs = [z, *parameters]
        sums, total, before = [torch.zeros_like(x) for x in inputs], z.new_zeros(()), None
        count, last = z.shape[2], target.shape[2] - 1
        for k in range(count):
            frame = round(k * last / max(1, count - 1))
            wanted = target[:, :, frame : frame + 1]
            with torch.enable_grad():
                decoded, _ = decoder.step(z[:, :, k : k + 1], decoder.initial_state())
                loss = loss_fn(decoded, wanted)
                if before is not None:
                    loss = loss + self.difference * F.mse_loss(decoded - before[0], wanted - before[1])
                loss = loss / count
                found = torch.autograd.grad(loss, inputs, allow_unused=True)
            for into, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    into += gradient
            total, before = total + loss.detach(), (decoded.detach(), wanted)
        return with_gradients(total, [latents, *parameters], sums)


def with_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar with this value and these gradients."""
    linear = sum(((x * g).sum() for x, g in zip(inputs, gradients, strict=True)), value.new_zeros(()))
    return value.detach() + (linear - linear.detach())


ARMS: Mapping[str, Arm] = {
    "latent": LatentOnly(),
    "latent-tuned": Tuned(Exact(offload=False)),
    "isolated": Isolated(),
    "first": Rival(FirstLatents()),
    "chop-0": Strategic(Chop(0)),
    "chop-1": Strategic(Chop(1)),
    "chop-2": Strategic(Chop(2)),
    "chop-4": Strategic(Chop(4)),
    "block-4": Strategic(Chop(1, block=4)),
    "exact": Strategic(Exact(offload=False)),
    "exact-frozen": Frozen(Exact(offload=False)),
    "full": Strategic(Full()),
    "exact-offload": Strategic(Exact(offload=True, pieces=True)),
}

CONTROLS = ("latent-tuned", "exact-frozen")
"""Of tasks whose decoder trains: what is the loss's, and what the trained decoder's."""

MEANING: Mapping[str, str] = {
    "latent": "latent MSE only",
    "latent-tuned": "latent MSE, decoder tuned on targets",
    "isolated": "frames decoded alone (DOVE)",
    "first": "first 3 latents only",
    "chop-0": "ChopGrad D = 0",
    "chop-1": "ChopGrad D = 1",
    "chop-2": "ChopGrad D = 2",
    "chop-4": "ChopGrad D = 4",
    "block-4": "look-ahead block, W = 4, D = 1",
    "exact": "exact (recomputed)",
    "exact-frozen": "exact, decoder frozen",
    "full": "full back-propagation",
    "exact-offload": "exact, by pieces, states on the host",
}


def arm_by_name(name: str) -> Arm:
    """Raises ValueError: unknown name."""
    if name not in ARMS:
        raise ValueError(f"Unknown arm or gradient '{name}': pass one of {', '.join(ARMS)}.")
    return ARMS[name]
