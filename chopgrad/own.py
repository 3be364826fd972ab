"""What a VAE itself does that a step of ours would pass by without a word: found, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from chopgrad.recurrence import PassedBy, Recurrence, is_patched

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


def check_source(vae: nn.Module, cls: type[Recurrence]) -> None:
    """Refuse a class from elsewhere, and code of its own in the places that a step does not call.

    Raises:
        ValueError: the message says what was found, and what to do.
    """
    if any(type(p).__name__ == "DTensor" for p in vae.parameters()):
        raise ValueError(
            "The VAE's parameters are sharded (fully_shard): leave it out, a video VAE is small, and shard the module "
            "whose forward calls chopgrad."
        )
    part = getattr(vae, cls.part, None)
    part = getattr(part, "_orig_mod", part)
    _refuse_split(part, f"vae.{cls.part}")
    for module, name, methods in ((vae, "vae", cls.own_methods), (part, f"vae.{cls.part}", ("forward",))):
        for method in methods:
            source = _source(module, method)
            if source is not None and source.split(".")[0] != cls.package:
                raise ValueError(
                    f"{name}.{method} is not that of {cls.package} but of {source}, which would not be called: take it "
                    f"off, or write {_a(cls.part)} for it (a subclass of chopgrad.Causal{cls.part.title()}). For "
                    f"weights in the original format: {SINGLE_FILE}."
                )


def check_by_trial(ours: Recurrence) -> list[PassedBy]:
    """Run two groups of a tiny input here and by the VAE itself.

    Args:
        ours: with the clamp that the VAE applies.

    Returns:
        What the VAE calls and a step does not: hooks on it would not be run.

    Raises:
        ValueError: the results differ, or the groups do not tile.
    """
    vae = ours.vae
    weight = next(ours.parameters(), None)
    if weight is None:
        raise ValueError(
            f"{type(ours).__name__} has no parameters: let its modules() return the VAE's modules that a step calls."
        )
    hooked = hasattr(vae, "_hf_hook")
    if isinstance(weight, FakeTensor) or (weight.is_meta and not hooked):
        return []  # nothing has values
    length = two_groups(ours)
    method = f"{type(vae).__name__}.{ours.part.removesuffix('r')}"
    shape = (1, ours.source_channels, length, ours.trial_size, ours.trial_size)
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    with torch.no_grad(), _evaluating(vae), tensors_left_away(vae), torch.compiler.set_stance("force_eager"):
        ours.prepare()
        weight = next(iter(ours.parameters()))
        device = getattr(vae._hf_hook, "execution_device", "cpu") if weight.is_meta else weight.device
        x = x.to(device, working_dtype(ours))
        with _recorded(vae) as called_by_vae:
            theirs = ours.own(x)
        with _recorded(vae) as called_here:
            try:
                here = ours.run(x)
            except ValueError:
                raise
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{method} runs, but not this {ours.part}: {type(error).__name__}: {first} Something around its "
                    "modules (a wrapper, offloading by modules) is not called by a step: take it off."
                ) from error
    if here.shape != theirs.shape:
        raise ValueError(f"{list(shape)} becomes {list(here.shape)} here, but {list(theirs.shape)} by {method}.")
    difference = ((here - theirs).norm() / theirs.norm()).item()
    # Some VAEs cast to float32 inside, so that float64 is not exact either.
    tolerance = min(4 * max(torch.finfo(x.dtype).eps, 1e-10) ** 0.5, 0.06)
    if not difference <= tolerance and bool(theirs.isfinite().all()):
        raise ValueError(
            f"{method} gives something else than this {ours.part} (relative difference {difference:.1e} on a tiny "
            "input): something changes what its blocks compute (a hook, a wrapper, an override), and would not be "
            "called. Take it off, or put it on a convolution or a norm; check=False leaves this test out."
        )
    passed_by = called_by_vae - called_here
    # A compiled module replaces its own forward; what counts is what is inside it.
    return [
        PassedBy(name, module, type(module))
        for name, module in vae.named_modules()
        if module in passed_by and not hasattr(module, "_orig_mod")
    ]


def working_dtype(model: Recurrence) -> torch.dtype:
    """What its weights compute in, which under layerwise casting is not what they are stored in."""
    for module in model.modules():
        for each in module.modules():
            registry: Any = getattr(each, "_diffusers_hook", None)
            casting = registry.get_hook("layerwise_casting") if registry is not None else None
            if casting is not None:
                return casting.compute_dtype
    return next(iter(model.parameters())).dtype


def two_groups(model: Recurrence) -> int:
    """The least length that runs in two groups or more; of a model of images, which takes nothing longer, one.

    Raises:
        ValueError: no length up to 256 does; the model's own error where it runs on none.
    """
    refused: ValueError | None = None
    taken = []
    for length in range(1, 257):
        try:
            if len(model.groups(length)) >= 2:
                return length
            taken.append(length)
        except ValueError as error:  # a length that fits no group
            refused = refused or error
    if taken == [1]:
        return 1
    if not taken and refused is not None:
        raise refused
    raise ValueError(f"{type(model).__name__}: no number of {model.entering} up to 256 runs in two groups.")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


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
        if is_patched(module, method):
            return None
        own = getattr(own, "_torchdynamo_orig_callable", own)
        own = getattr(own, "__func__", own)
        return f"{getattr(own, '__module__', None) or type(own).__module__}.{getattr(own, '__qualname__', method)}"
    definer = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
    if definer is None:
        return None
    # Of the function, which somebody may have put on the class.
    source = getattr(vars(definer)[method], "__module__", None)
    return f"{source or definer.__module__}.{definer.__qualname__}"


def tensors_on(module: nn.Module) -> dict[str, Any]:
    """What a module holds tensors in besides parameters and buffers: where hidden caches live. Lists are copied."""
    found = {}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if any(isinstance(x, Tensor) for x in tree_leaves(value)):
            found[name] = copy(value) if isinstance(value, list | dict) else value
    return found


@contextmanager
def tensors_left_away(vae: nn.Module) -> Iterator[None]:
    """What the VAE's own code leaves on its modules in the block is taken off, and what was there is put back."""
    before = [(module, tensors_on(module), set(vars(module))) for module in vae.modules()]
    try:
        yield
    finally:
        for module, kept, names in before:
            for name in tensors_on(module):
                value = vars(module)[name]
                if name not in names:
                    delattr(module, name)
                elif name not in kept:
                    vars(module)[name] = [None] * len(value) if isinstance(value, list) else None
            vars(module).update(kept)


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
