"""``chopgrad audit``: what holds for a VAE and its weights, what does not, and what nobody will see.

The kit (``chopgrad.testing``) is for code; this is for a model as it is loaded, with its hooks, and for a clip.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from chopgrad.decode import decode
from chopgrad.decoders import CausalDecoder, decoder_for
from chopgrad.loss import frame_loss
from chopgrad.own import bare, tensors_left_away, tensors_on, two_groups
from chopgrad.strategies import RECOMMENDED, Chop, Exact

LossFn = Callable[[Tensor, Tensor], Tensor]
Verdict = Literal["right", "BROKEN", "refused", "note"]
EXACT = 1e-5
"""Relative, in float64: upstream casts to float32 inside (Wan's upsampler), and adds in another order."""
CENTRAL = 1e-2
"""The same for central differences."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: "right"; "BROKEN": a gradient or the frames are not what they should be; "refused": chopgrad does not
            take the VAE as it is, and says so to whoever tries; "note": worth knowing.
        value: the number, where it is one.
        sentence: what was found, and what follows from it.
    """

    name: str
    verdict: Verdict
    value: float | None
    sentence: str


def audit(
    vae: nn.Module,
    video: Tensor | None = None,
    loss_fn: LossFn | None = None,
    *,
    distances: Sequence[int] = (0, 1, 2, 4),
    size: int = 4,
    most_latents: int = 48,
    said: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Look at a VAE as it is: forward parity, gradients, truncation, receptive field, clamp, leftovers, checkpointing.

    Args:
        vae: as it was loaded; it is not changed, what computes is a copy in float64.
        video: [1, 3, frames, H, W] in [-1, 1], with a number of frames that the VAE encodes: latents and target of the
            loss. None: random latents, for which a bias says little.
        loss_fn: ``loss_fn(frames, target) -> scalar``, a mean over frames. Default: mse_loss.
        distances: of truncation, in frame groups.
        size: height and width of random latents.
        most_latents: how far the temporal receptive field is looked for.
        said: is told what is being looked at.

    Returns:
        The findings in order.

    Raises:
        ValueError, TypeError: a video that does not fit.

    Cost: some decodes and backward passes of a short clip in float64, and one of ``most_latents`` latents of the
    smallest size: minutes on a CPU for a published VAE.
    """
    vae, loss_fn, said = bare(vae), loss_fn or F.mse_loss, said or (lambda _: None)
    found: list[Finding] = []
    said("hooks and overrides")
    try:
        decoder_for(vae)
        found.append(Finding("hooks and overrides", "right", None, "Nothing would be passed by."))
    except ValueError as error:
        found.append(Finding("hooks and overrides", "refused", None, str(error)))
    in_float64 = _in_float64(vae)
    try:
        decoder = decoder_for(in_float64)
    except ValueError as error:
        if found[0].verdict != "refused":
            found.append(Finding("decoder", "refused", None, str(error)))
        return found
    latents, target = _source(decoder, video, size)
    said("forward parity")
    found += _forward(decoder, latents)
    said("gradient")
    found += _gradient(decoder, latents, target, loss_fn)
    said("truncation")
    found += _truncation(decoder, latents, target, loss_fn, distances, video is not None)
    said("temporal receptive field")
    found.append(_receptive_field(decoder, most_latents))
    said("upstream checkpointing")
    found.append(_upstream_checkpointing(decoder, latents))
    return found


def is_refused(findings: Sequence[Finding]) -> bool:
    return any(x.verdict == "refused" for x in findings)


def is_broken(findings: Sequence[Finding]) -> bool:
    return any(x.verdict == "BROKEN" for x in findings)


def as_table(findings: Sequence[Finding]) -> str:
    """Markdown."""
    lines = ["| looked at | verdict | value | what follows |", "|---|---|---:|---|"]
    for x in findings:
        value = "" if x.value is None else f"{x.value:.3g}"
        lines.append(f"| {x.name} | {x.verdict} | {value} | {' '.join(x.sentence.split())} |")
    return "\n".join(lines)


def as_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(x) for x in findings]


def _in_float64(vae: nn.Module) -> nn.Module:
    if any(p.is_meta for p in vae.parameters()):
        raise ValueError("The VAE has weights on meta (offloaded, or not loaded): load it whole, and audit it then.")
    bad = next((name for name, p in vae.named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"'{bad}' has weights that are not finite: load the VAE again.")
    other = deepcopy(vae)
    vars(other).pop("decode", None)  # of chopgrad.patch: it decodes the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Module.to(other, dtype=torch.float64).eval().requires_grad_(False)


def _source(decoder: CausalDecoder, video: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Latents and target."""
    weight = next(decoder.parameters())
    if video is None:
        size = max(size, decoder.trial_size)
        shape = (1, decoder.latent_channels, _four_groups(decoder), size, size)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        latents = decoder.denormalize(z.to(weight))
        with torch.no_grad():
            return latents, torch.zeros_like(decoder.decode(latents))
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"video must be [1, 3, frames, height, width], got {list(video.shape)}.")
    if not video.is_floating_point() or video.abs().max() > 1.001:
        raise ValueError("video must be floating point in [-1, 1]: from 8-bit frames x.float() / 127.5 - 1.")
    if not callable(getattr(decoder.vae, "encode", None)) or getattr(decoder.vae, "encoder", None) is None:
        raise ValueError(f"This {type(decoder.vae).__name__} has no encoder for a clip: audit it without one.")
    what = f"{list(video.shape)}, [batch, channels, frames, height, width]"
    try:
        with torch.no_grad():
            latents = decoder.vae.encode(video.to(weight)).latent_dist.mean
            decoded = decoder.decode(latents).shape
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the VAE does not take a clip of {what}, try other frames or another size: {first}"
        ) from error
    if decoded != video.shape:
        raise ValueError(f"a clip of {what} becomes {list(decoded)}: pass as many frames, and of a size, as come back.")
    return latents, video.to(weight)


def _four_groups(decoder: CausalDecoder) -> int:
    """The least length that decodes in four groups, the last as long as the one before; else in two."""
    for count in range(1, 257):
        if _decodes(decoder, count):
            frames = [group.frame_count for group in decoder.frame_groups(count)]
            if len(frames) == 4 and frames[-1] == frames[-2]:
                return count
    return two_groups(decoder)


def _forward(decoder: CausalDecoder, latents: Tensor) -> Iterator[Finding]:
    vae, before = decoder.vae, _left_on_modules(decoder.vae)
    with torch.no_grad(), tensors_left_away(vae):
        theirs = decoder.own_decode(latents)
        left = _left_on_modules(vae) - before
    with torch.no_grad():
        ours = decoder.decode(latents)
    error = _relative(ours, theirs)
    yield _judged("forward parity", error, EXACT, "Frames are those of the VAE's own decode.", "Frames are others.")
    free = copy(decoder)
    free.clamp = False
    with torch.no_grad():
        share = (free.decode(latents) != ours).double().mean().item()
    ends = f"{100 * share:.2g} % of the values are clamped and get no gradient; clamp=False leaves the clamp out."
    yield Finding("saturated pixels", "note", share, ends if share else "No value is clamped on this input.")
    kept = "Its own decode leaves none on its modules." if left == 0 else "Its own decode leaves them on its modules."
    yield Finding("tensors left behind", "note", float(left), kept)


def _gradient(decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Iterator[Finding]:
    leaf = latents.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss_fn(decoder.own_decode(leaf), target), leaf)
    leaf = latents.clone().requires_grad_()
    (ours,) = torch.autograd.grad(loss_fn(decode(decoder, leaf, Exact(offload=False)), target), leaf)
    error = _relative(ours, plain)
    yield _judged("exact gradient", error, EXACT, "It is that of plain back-propagation.", "Plain's is another.")
    # Where memory is short the default comes down to these.
    least = Exact(pieces=True, strips=2) if decoder.is_composed else Exact(offload=True)
    error = 0.0
    for default in (RECOMMENDED, least):
        (ours,) = torch.autograd.grad(loss_fn(decode(decoder, leaf, default), target), leaf)
        error = max(error, _relative(ours, plain))
    yield _judged("by default", error, EXACT, "So is that of the default strategy.", "That of the default is another.")
    yield _of_weights(decoder, latents, target, loss_fn)
    (ours,) = torch.autograd.grad(frame_loss(decoder, leaf, target, loss_fn, Exact(offload=False)), leaf)
    error = _relative(ours, plain)
    same, other = "The loss may be streamed with frame_loss.", "Streamed, it is another: is it no mean over frames?"
    yield Finding("streamed loss", "right" if error < EXACT else "note", error, same if error < EXACT else other)
    along = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(latents)
    along = along * (plain.norm() / along.norm()) + plain  # not across it
    expected, errors = (plain * along).sum(), []
    for size in (1e-4, 1e-6, 1e-8):  # the more a model bends, the smaller
        step = size * latents.norm() / along.norm()
        with torch.no_grad():
            ends = [loss_fn(decoder.own_decode(latents + sign * step * along), target) for sign in (1, -1)]
        errors.append(abs(((ends[0] - ends[1]) / (2 * step) - expected) / expected).item())
    error = min(errors)
    right = "Plain back-propagation agrees with them."
    wrong = "Plain back-propagation does not: something in the decoder is not what autograd differentiates."
    yield _judged("central differences", error, CENTRAL, right, wrong)


def _of_weights(decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn) -> Finding:
    """Of every weight: what plain back-propagation reaches, and by how much ours is off."""
    vae = decoder.vae
    named = [(name, p) for name, p in vae.named_parameters() if p.is_floating_point()]
    vae.requires_grad_(True)
    try:
        of_all = torch.autograd.grad(
            loss_fn(decoder.own_decode(latents), target), [p for _, p in named], allow_unused=True
        )
        plain = {id(p): g for (_, p), g in zip(named, of_all, strict=True) if g is not None}
        listed = list(decoder.parameters())
        ours = torch.autograd.grad(
            loss_fn(decode(decoder, latents, Exact(offload=False)), target),
            listed,
            allow_unused=True,
            materialize_grads=True,
        )
    finally:
        vae.requires_grad_(False)
    left_out = [name for name, p in named if id(p) in plain and all(p is not q for q in listed)]
    if left_out:
        told = f"{len(left_out)} get none here, {left_out[0]} among them: let the decoder's modules() return theirs."
        return Finding("gradients of weights", "BROKEN", float(len(left_out)), told)
    scale = max((g.norm().item() for g in plain.values()), default=1.0)
    error = max(
        ((g - plain.get(id(p), torch.zeros_like(g))).norm() / max(g.norm().item(), 1e-3 * scale, 1e-300)).item()
        for p, g in zip(listed, ours, strict=True)
    )
    right, wrong = "They are those of plain back-propagation.", "Plain back-propagation's are others."
    return _judged("gradients of weights", error, EXACT, right, wrong)


def _truncation(
    decoder: CausalDecoder, latents: Tensor, target: Tensor, loss_fn: LossFn, distances: Sequence[int], real: bool
) -> Iterator[Finding]:
    def gradient(strategy: Any) -> Tensor:
        leaf = latents.clone().requires_grad_()
        return torch.autograd.grad(loss_fn(decode(decoder, leaf, strategy), target), leaf)[0]

    exact = gradient(Exact(offload=False))
    groups = len(decoder.frame_groups(latents.shape[2]))
    of = "" if real else " On random latents that says little: pass a clip."
    for distance in distances:
        if distance >= groups - 1:
            break
        got = gradient(Chop(distance))
        cosine = F.cosine_similarity(got.flatten(), exact.flatten(), dim=0).item()
        told = f"Relative error of the gradient; cosine {cosine:.3f}, over {groups} frame groups.{of}"
        yield Finding(f"truncation at D = {distance}", "note", _relative(got, exact), told)


def _receptive_field(decoder: CausalDecoder, most: int) -> Finding:
    """The least distance of a truncation that is exact whatever the loss."""
    name = "temporal receptive field, groups"
    count = most
    while count > 1 and not _decodes(decoder, count):
        count -= 1
    shape = (1, decoder.latent_channels, count, decoder.trial_size, decoder.trial_size)
    weight = next(decoder.parameters())
    z = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(weight).requires_grad_()
    groups = decoder.frame_groups(count)

    if all(a.latents.stop <= b.latents.start for a, b in pairwise(groups)):
        frames = decode(decoder, z, Exact(offload=False), groups=slice(len(groups) - 1, None))
        (of_last,) = torch.autograd.grad(frames, z, _adjoint(frames))
        parts = [of_last[:, :, group.latents] for group in groups]
    else:  # latents of several groups do not tell through which of them they came: each has its own
        leaves = [z[:, :, group.latents].detach().clone().requires_grad_() for group in groups]
        state = decoder.initial_state()
        for leaf in leaves:
            frames, state = decoder.step(leaf, state)
        found = torch.autograd.grad(frames, leaves, _adjoint(frames), allow_unused=True)
        parts = [torch.zeros_like(z) if g is None else g for z, g in zip(leaves, found, strict=True)]
    first = next(i for i, part in enumerate(parts) if part.any())
    distance, whole = len(groups) - 1 - first, first > 0
    told = f"From distance {distance} on a truncation is exact." if whole else "It is longer than what was looked at."
    return Finding(name, "note", float(distance), told)


def _adjoint(frames: Tensor) -> Tensor:
    return torch.randn(frames.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(frames)


def _decodes(decoder: CausalDecoder, count: int) -> bool:
    try:
        decoder.frame_groups(count)
    except ValueError:
        return False
    return True


def _upstream_checkpointing(decoder: CausalDecoder, latents: Tensor) -> Finding:
    """That of the VAE itself, in training mode, against none."""
    name, vae = "upstream checkpointing", decoder.vae
    enable = getattr(vae, "enable_gradient_checkpointing", None)
    if enable is None:
        return Finding(name, "note", None, "There is none.")

    def run() -> tuple[Tensor, int]:
        leaf, saved = latents.clone().requires_grad_(), 0

        def pack(x: Tensor) -> Tensor:
            nonlocal saved
            saved += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            frames = decoder.own_decode(leaf)
        return torch.autograd.grad(frames.square().mean(), leaf)[0], saved

    try:
        with _training(vae):
            plain, before = run()
            enable()
            got, after = run()
    except Exception as raised:  # whatever upstream raises is the finding
        first = (str(raised).splitlines() or [""])[0]
        return Finding(name, "note", None, f"It cannot be used: {type(raised).__name__}: {first}")
    finally:
        disable = getattr(vae, "disable_gradient_checkpointing", None)
        if disable is not None:
            disable()
    error = _relative(got, plain)
    if error > EXACT:
        return Finding(name, "BROKEN", error, "It is silently wrong: use checkpoint= of decoder_for in its place.")
    if after >= before:
        return Finding(name, "note", error, "It does nothing: use checkpoint= of decoder_for.")
    return Finding(name, "right", error, f"It keeps {100 * after / before:.0f} % of what is saved without it.")


@contextmanager
def _training(vae: nn.Module) -> Iterator[None]:
    """Training mode without dropout."""
    dropouts = [m for m in vae.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    vae.train()
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        vae.eval()


def _left_on_modules(vae: nn.Module) -> int:
    return sum(isinstance(x, Tensor) for module in vae.modules() for x in tree_leaves(tensors_on(module)))


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)).item()


def _judged(name: str, error: float, allowed: float, right: str, wrong: str) -> Finding:
    holds = error <= allowed
    return Finding(name, "right" if holds else "BROKEN", error, right if holds else wrong)
