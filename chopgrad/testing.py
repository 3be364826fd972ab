"""The conformance kit: what every ``CausalDecoder`` must satisfy, as one function to call from a test.

from chopgrad.testing import check_decoder
check_decoder(MyDecoder(vae))
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chopgrad.decoders.base import CausalDecoder
from chopgrad.loss import frame_loss
from chopgrad.strategies import Chop, Exact, Full


class ConformanceError(AssertionError):
    """A decoder breaks one of the properties that the engine relies on."""


def check_decoder(
    decoder: CausalDecoder, latent_frames: int = 4, size: int = 2, batch: int = 1, tolerance: float | None = None
) -> dict[str, float]:
    """Check a decoder on random latents, with the weights that it has.

    Use a small random model in float64, where the default tolerance tells a wrong cache from rounding.

    Args:
        decoder: the recurrence under test, with the clamp that the VAE's own decode applies.
        latent_frames: the longest sequence tried; every shorter one is tried too.
        size: height and width of the latents.
        tolerance: relative; default 2^16 times the resolution of the decoder's dtype.

    Returns:
        The largest relative difference seen per property.

    Raises:
        ConformanceError: names the property that does not hold, and by how much.

    Cost: a few decodes and backward passes of ``latent_frames`` latents, whole graphs in memory.
    """
    weight = next(decoder.parameters())
    tolerance = tolerance or 2**16 * torch.finfo(weight.dtype).eps
    generator = torch.Generator().manual_seed(0)
    shape = (batch, decoder.latent_channels, latent_frames, size, size)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
    differences: dict[str, float] = {}

    def require(name: str, difference: float, meaning: str) -> None:
        differences[name] = max(differences.get(name, 0.0), difference)
        if not difference <= tolerance:
            raise ConformanceError(
                f"{name}: {meaning} (relative difference {difference:.1e}, allowed {tolerance:.1e})."
            )

    for count in range(1, latent_frames + 1):
        _check_groups(decoder, count)
        with torch.no_grad():
            ours, theirs = decoder.decode(latents[:, :, :count]), decoder.own_decode(latents[:, :, :count])
        if ours.shape != theirs.shape:
            raise ConformanceError(
                f"frame count: {count} latents give {list(ours.shape)} here, {list(theirs.shape)} by the VAE's decode."
            )
        require(
            "forward", _difference(ours, theirs), f"{count} latents decode to other frames than by the VAE's own decode"
        )
    _check_purity(decoder, latents)
    require(
        "normalisation",
        _difference(decoder.denormalize(decoder.normalize(latents)), latents),
        "denormalize does not invert normalize",
    )
    with torch.no_grad():
        target = torch.randn(decoder.decode(latents).shape, generator=generator, dtype=torch.float64).to(weight)
    leaf = latents.clone().requires_grad_()
    # Through the VAE's own decode, so that a step that cuts the graph between groups is noticed.
    plain = torch.autograd.grad((decoder.own_decode(leaf) - target).square().mean(), leaf)[0]
    for strategy in (Full(), Exact(), Chop(latent_frames)):
        gradient = _gradient(decoder, latents, target, strategy)
        require("exact gradient", _difference(gradient, plain), f"{strategy} differs from ordinary back-propagation")
    kept, rebuilt = (_gradient(decoder, latents, target, Chop(1, recompute=r)) for r in (False, True))
    require("recomputation", _difference(rebuilt, kept), "a repeated step gives another gradient than the first")
    return differences


def _gradient(decoder: CausalDecoder, latents: Tensor, target: Tensor, strategy: Full | Chop | Exact) -> Tensor:
    leaf = latents.clone().requires_grad_()
    loss = frame_loss(decoder, leaf, target, torch.nn.functional.mse_loss, strategy)
    return torch.autograd.grad(loss, leaf)[0]


def _difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)).item()


def _check_groups(decoder: CausalDecoder, count: int) -> None:
    latent = frame = 0
    for group in decoder.frame_groups(count):
        if group.latents.start != latent or group.frames.start != frame or group.frame_count < 1:
            raise ConformanceError(
                f"frame groups: those of {count} latents do not tile latents and frames in order: {group}."
            )
        latent, frame = group.latents.stop, group.frames.stop
    if latent != count:
        raise ConformanceError(f"frame groups: those of {count} latents cover {latent} latents.")


def _check_purity(decoder: CausalDecoder, latents: Tensor) -> None:
    before = list(_tensors_on_modules(decoder))  # held, so that no new tensor can have the id of one of them
    groups = decoder.frame_groups(latents.shape[2])
    state = decoder.initial_state()
    for group in groups:
        z = latents[:, :, group.latents]
        copies = [x.clone() for x in tree_leaves(state) if isinstance(x, Tensor)]
        with torch.no_grad():
            first, after = decoder.step(z, state)
            again, _ = decoder.step(z, state)
        kept = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
        if not torch.equal(first, again) or any(not torch.equal(a, b) for a, b in zip(copies, kept, strict=True)):
            raise ConformanceError(
                f"purity: step at latents {group.latents} changes its state, or differs when repeated."
            )
        state = after
    if any(all(x is not y for y in before) for x in _tensors_on_modules(decoder)):
        raise ConformanceError("purity: step leaves tensors on the model's modules; all memory must be in the state.")


def _tensors_on_modules(decoder: CausalDecoder) -> Iterator[Tensor]:
    """Tensors that modules hold besides parameters and buffers: where hidden caches live."""
    for module in decoder.vae.modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        yield from (x for x in tree_leaves(own) if isinstance(x, Tensor))
