"""What a VAE's own ``decode`` does that a step of ours would pass by without a word: found, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from chopgrad.decoders.base import CausalDecoder, is_patched

SPLIT = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
SINGLE_FILE = 'AutoencoderKLWan.from_single_file("Wan2.1_VAE.pth", config=FOLDER)'


def bare(vae: Any) -> Any:
    """The diffusers model inside a PeftModel or a compiled module.

    Raises:
        ValueError: inside what splits a model over processes; the message says which object to pass.
    """
    if not isinstance(vae, nn.Module):
        raise TypeError(f"vae must be a diffusers model, got {type(vae).__name__}.")
    while True:
        _refuse_split(vae, "the VAE")
        if hasattr(vae, "_orig_mod"):
            vae = vae._orig_mod
        elif hasattr(vae, "get_base_model"):
            vae = cast(Any, vae).get_base_model()
        else:
            return vae


def check_source(vae: nn.Module, package: str) -> None:
    """Refuse a class from elsewhere, and code of its own in the places that a step does not call.

    Raises:
        ValueError: the message says what was found, and what to do.
    """
    if any(type(p).__name__ == "DTensor" for p in vae.parameters()):
        raise ValueError(
            "The VAE's parameters are sharded (fully_shard): leave it out, a video VAE is small, and shard the module "
            "whose forward calls chopgrad."
        )
    decoder = getattr(vae, "decoder", None)
    decoder = getattr(decoder, "_orig_mod", decoder)
    _refuse_split(decoder, "vae.decoder")
    for module, name, methods in ((vae, "vae", ("decode", "_decode")), (decoder, "vae.decoder", ("forward",))):
        for method in methods:
            source = _source(module, method)
            if source is not None and source.split(".")[0] != package:
                raise ValueError(
                    f"{name}.{method} is not that of {package} but of {source}, which would not be called: take it "
                    "off, or write a decoder for it (a subclass of chopgrad.CausalDecoder). For weights in the "
                    f"original format: {SINGLE_FILE}."
                )


def check_by_trial(decoder: CausalDecoder) -> list[tuple[str, nn.Module]]:
    """Decode two groups of 2x2 latents here and by the VAE itself.

    Returns:
        Name and module of what the VAE's decode calls and a step does not: hooks on them would not be run.

    Raises:
        ValueError: the frames differ.
    """
    vae = decoder.vae
    weight = next(iter(decoder.parameters()))
    hooked = hasattr(vae, "_hf_hook")
    if isinstance(weight, FakeTensor) or (weight.is_meta and not hooked):
        return []  # nothing has values
    count = next(n for n in range(1, 100) if len(decoder.frame_groups(n)) == 2)
    shape = (1, decoder.latent_channels, count, 2, 2)
    z = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    ours = copy(decoder)
    ours.clamp = True
    with torch.no_grad(), _evaluating(vae), torch.compiler.set_stance("force_eager"):
        decoder.prepare()
        weight = next(iter(decoder.parameters()))
        device = getattr(vae._hf_hook, "execution_device", "cpu") if weight.is_meta else weight.device
        z = z.to(device, getattr(vae, "dtype", weight.dtype))
        with _recorded(vae) as called_by_vae:
            theirs = ours.own_decode(z)
        with _recorded(vae) as called_here:
            frames = ours.decode(z)
    if frames.shape != theirs.shape:
        raise ValueError(
            f"{count} latents decode to {list(frames.shape)} here, but to {list(theirs.shape)} by {type(vae).__name__}."
            "decode."
        )
    difference = ((frames - theirs).norm() / theirs.norm()).item()
    tolerance = 4 * torch.finfo(z.dtype).eps ** 0.5
    if difference > tolerance and bool(theirs.isfinite().all()):
        raise ValueError(
            f"{type(vae).__name__}.decode gives other frames than this decoder (relative difference {difference:.1e} "
            "on a tiny latent): something changes what its blocks compute (a hook, a wrapper, an override), and would "
            "not be called. Take it off, or put it on a convolution or a norm; check=False leaves this test out."
        )
    passed_by = called_by_vae - called_here
    # A compiled module replaces its own forward; what counts is what is inside it.
    return [
        (n, module) for n, module in vae.named_modules() if module in passed_by and not hasattr(module, "_orig_mod")
    ]


def _refuse_split(module: Any, name: str) -> None:
    if type(module).__name__ in SPLIT:
        raise ValueError(
            f"{name} is wrapped in {type(module).__name__}, which has no decode: pass what is inside (its .module), "
            "and wrap the module whose forward calls chopgrad."
        )


def _source(module: Any, method: str) -> str | None:
    """Where the code of a method comes from; None where there is no such method, or it is ours."""
    own = vars(module).get(method)
    if own is not None:
        if method == "decode" and is_patched(module):
            return None
        own = getattr(own, "_torchdynamo_orig_callable", own)
        own = getattr(own, "__func__", own)
        return f"{getattr(own, '__module__', None) or type(own).__module__}.{getattr(own, '__qualname__', method)}"
    definer = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
    return None if definer is None else f"{definer.__module__}.{definer.__qualname__}"


@contextmanager
def _evaluating(vae: nn.Module) -> Iterator[None]:
    """Without dropout, and without buffers that change."""
    training = [module for module in vae.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _recorded(vae: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules that are called in the block."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(note) for module in vae.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
