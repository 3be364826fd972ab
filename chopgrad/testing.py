"""The conformance kit: what every recurrence must satisfy, as one function to call from a test.

from chopgrad.testing import check_decoder, check_encoder
check_decoder(MyDecoder(vae))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chopgrad.decoders.base import CausalDecoder
from chopgrad.encoders.base import CausalEncoder
from chopgrad.loss import frame_loss
from chopgrad.own import tensors_on, two_groups
from chopgrad.recurrence import Recurrence, walk
from chopgrad.strategies import Chop, Exact, Full, Strategy
from chopgrad.whole import requiring_grad, run_whole


class ConformanceError(AssertionError):
    """A decoder or encoder breaks one of the properties that the engine relies on; the message names what to mend."""


def check_decoder(
    decoder: CausalDecoder,
    latent_frames: int | None = None,
    size: int | None = None,
    batch: int = 2,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Check a decoder on random latents, with the weights that it has.

    Use a small random model in float64, where the default tolerance tells a wrong cache from rounding. Frames, and the
    gradients of latents and of every weight, must be those of the VAE's own decode under plain back-propagation, for
    strategies that keep graphs, rebuild them, walk pieces or offload, and for each ``checkpoint``.

    Args:
        decoder: the recurrence under test, with the clamp that the VAE's own decode applies.
        latent_frames: the longest sequence tried; every shorter one that the decoder takes is tried too. Default: what
            decodes in three groups, at least 4.
        size: height and width of the latents. Default: the decoder's ``trial_size``.
        batch: of the longest sequence.
        tolerance: relative; default 2^16 times the resolution of the decoder's dtype.

    Returns:
        The largest relative difference seen per property.

    Raises:
        ConformanceError: names the property that does not hold, by how much, and the method to mend.

    Cost: some tens of decodes and backward passes of ``latent_frames`` latents, whole graphs in memory.
    """
    found = _Check(decoder, latent_frames, size, batch, tolerance)
    found.run()
    latents = found.source
    found.require(
        "normalisation",
        _difference(decoder.denormalize(decoder.normalize(latents)), latents),
        "denormalize does not invert normalize: mend one of them",
    )
    target = torch.randn(found.plain.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(latents)
    for strategy in (Exact(offload=False), Chop(len(decoder.frame_groups(latents.shape[2])))):
        leaf = latents.clone().requires_grad_()
        expected = torch.autograd.grad((decoder.own_decode(leaf) - target).square().mean(), leaf)[0]
        loss = frame_loss(decoder, leaf, target, torch.nn.functional.mse_loss, strategy)
        difference = _difference(torch.autograd.grad(loss, leaf)[0], expected)
        found.require(
            "streamed loss", difference, f"frame_loss with {strategy} has another gradient: mend frame_groups"
        )
    return found.differences


def check_encoder(
    encoder: CausalEncoder,
    frames: int | None = None,
    size: int | None = None,
    batch: int = 2,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Check an encoder on random video as ``check_decoder`` checks a decoder, against the VAE's own encode.

    Args:
        encoder: the recurrence under test.
        frames: the longest video tried; every shorter one that the encoder takes is tried too. Default: what encodes in
            three groups, at least 4.
        size: height and width in pixels. Default: the encoder's ``trial_size``.
        batch, tolerance: see ``check_decoder``.

    Returns:
        The largest relative difference seen per property.

    Raises:
        ConformanceError: names the property that does not hold, by how much, and the method to mend.
    """
    found = _Check(encoder, frames, size, batch, tolerance)
    found.run()
    return found.differences


class _Check:
    """All properties that decoders and encoders share."""

    def __init__(
        self, model: Recurrence, length: int | None, size: int | None, batch: int, tolerance: float | None
    ) -> None:
        try:
            weight = next(model.parameters())
        except StopIteration:
            raise ConformanceError(
                "parameters: there are none. Let modules() return the VAE's modules that a step calls."
            ) from None
        self.model = model
        if not isinstance(model.source_channels, int):
            raise ConformanceError(f"form: channels must be an int (a property), got {model.source_channels!r}.")
        try:
            self.takes(two_groups(model))
            self.length = length or _longest(model)
        except ValueError as error:
            raise ConformanceError(f"groups: {error} Mend {self.grouping}.") from error
        if tolerance is None and weight.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"In {weight.dtype} rounding hides a wrong cache: pass a model in float64 or float32.")
        self.tolerance = tolerance or 2**16 * torch.finfo(weight.dtype).eps
        self.differences: dict[str, float] = {}
        size = size or model.trial_size
        shape = (batch, model.source_channels, self.length, size, size)
        self.source = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
        with torch.no_grad():
            self.plain = model.own(self.source)
        self.adjoint = torch.randn(
            self.plain.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).to(weight)

    def require(self, name: str, difference: float, meaning: str) -> None:
        self.differences[name] = max(self.differences.get(name, 0.0), difference)
        if not difference <= self.tolerance:
            raise ConformanceError(
                f"{name}: {meaning} (relative difference {difference:.1e}, allowed {self.tolerance:.1e})."
            )

    def run(self) -> None:
        # Form and purity first: what breaks them shows in all that follows.
        self.form()
        self.purity()
        self.forward()
        self.pieces()
        self.samples()
        self.gradients()
        self.checkpoints()

    def form(self) -> None:
        """What has another type or size than it must have."""
        model = self.model
        if not model.is_composed:
            if type(model).step is Recurrence.step:
                raise ConformanceError("form: there is neither blocks() nor step: write one of them.")
            return
        try:
            pieces = [piece for block in model.blocks() for unit in block for piece in unit]
        except TypeError as error:
            raise ConformanceError(
                "form: blocks() must return blocks, each a list of units, each a list of pieces: [[[piece, ...], ...]]."
            ) from error
        state = model.initial_state()
        if not isinstance(state, list | tuple) or len(state) != len(pieces):
            raise ConformanceError(
                f"form: initial_state() must be a tuple of {len(pieces)} slices, one for each piece of blocks(), got "
                f"{state!r}."
            )
        features: Any = (self.source[:1, :, model.groups(self.length)[0].takes],)
        for number, (piece, before) in enumerate(zip(pieces, state, strict=True)):
            with torch.no_grad():
                found = piece(features, before)
            fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], tuple)
            if not fits or not all(isinstance(x, Tensor) for x in found[0]):
                raise ConformanceError(
                    f"form: piece {number} of blocks() must return (features, state slice), features a tuple of "
                    f"tensors; got {type(found).__name__}."
                )
            features = found[0]

    def forward(self) -> None:
        model, taken = self.model, 0
        for length in range(1, self.length + 1):
            if not self.takes(length):
                continue
            taken += 1
            x = self.source[:1, :, :length]
            try:
                with torch.no_grad():
                    ours, theirs = model.run(x), model.own(x)
            except ValueError as error:  # of groups that do not tile, or that a step does not fit
                raise ConformanceError(f"groups: {error} Mend {self.grouping}, or step.") from error
            if ours.shape != theirs.shape:
                raise ConformanceError(
                    f"shape: {length} {model.entering} give {list(ours.shape)} here, {list(theirs.shape)} by the VAE's "
                    f"own {_verb(model)}: mend {self.grouping}, or step."
                )
            self.require(
                "forward",
                _difference(ours, theirs),
                f"{length} {model.entering} give something else than the VAE's own {_verb(model)}: mend blocks() or "
                f"step, what they keep in the state, or {self.grouping}; is a clamp missing, or too many?",
            )
        if not taken:
            raise ConformanceError(f"groups: no length up to {self.length} is taken: mend {self.grouping}.")
        self.further()

    def further(self) -> None:
        """A longer sequence, other heights than widths, and values that a clamp reaches; where the VAE takes them."""
        model, (_, channels, _, size, _) = self.model, self.source.shape
        long = next((n for n in range(self.length, 4 * self.length) if self.takes(n) and len(model.groups(n)) >= 8), 0)
        for name, length, wide in (("longer sequence", long, 1), ("other height than width", self.length, 2)):
            x = torch.randn(
                (1, channels, length, size, wide * size),
                generator=torch.Generator().manual_seed(2),
                dtype=torch.float64,
            ).to(self.source)
            theirs = self.of_vae(x) if length else None
            if theirs is not None:
                with torch.no_grad():
                    ours = model.run(x)
                same = ours.shape == theirs.shape and _difference(ours, theirs)
                difference = float("inf") if same is False else same
                self.require(name, difference, f"{list(x.shape)} give something else than the VAE's own {_verb(model)}")
        if isinstance(model, CausalDecoder):
            self.clamps(model)

    def clamps(self, model: CausalDecoder) -> None:
        """Both settings of the clamp, on latents so large that some frames reach it."""
        if not model.clamp:
            return
        without = copy(model)
        without.clamp = False
        for scale in (2.0**k for k in range(2, 12)):
            x = scale * self.source[:1]
            theirs = self.of_vae(x)
            if theirs is None:
                return
            ends = [theirs.max(), theirs.min()]
            reached = torch.stack([theirs == end for end in ends]).any(0)
            at = (reached.sum() - 2) / reached.numel()  # there is always a largest and a smallest
            if at > 0.05:
                break
        else:
            return
        with torch.no_grad():
            ours, free = model.run(x), without.run(x)
        self.require("clamp", _difference(ours, theirs), "of large latents frames are others: is self.clamped missing?")
        # A clamp leaves few values close to its ends; what bends towards them, such as tanh, leaves many.
        reach = 0.01 * (ends[0] - ends[1])
        close = torch.stack([(theirs - end).abs() < reach for end in ends]).any(0).double().mean() - at
        if close < 0.5 * at and torch.equal(free, ours):
            raise ConformanceError("clamp: clamp=False changes nothing: end the step with self.clamped.")

    def of_vae(self, x: Tensor) -> Tensor | None:
        """None where the VAE itself does not take it."""
        try:
            with torch.no_grad():
                return self.model.own(x)
        except (RuntimeError, ValueError, NotImplementedError):
            return None

    @property
    def grouping(self) -> str:
        return "frame_groups" if isinstance(self.model, CausalDecoder) else "latent_groups"

    def takes(self, length: int) -> bool:
        """Whether the model says that it runs on so many."""
        try:
            groups = self.model.groups(length)
        except ValueError:
            return False
        for group in groups:
            if not (hasattr(group, "takes") and hasattr(group, "yields")):
                raise ConformanceError(f"form: {self.grouping} must return FrameGroup or LatentGroup, got {group!r}.")
        return True

    def pieces(self) -> None:
        """The pieces, one after the other, are a step."""
        model = self.model
        if not model.is_composed:
            return
        state, pieces = model.initial_state(), model.pieces()
        for group in model.groups(self.length):
            x = self.source[:, :, group.takes]
            with torch.no_grad():
                y, after = model.step(x, state)
                features, by_pieces = walk(pieces, (x,), state)
            self.require("pieces", _difference(features[0], y), "step gives something else than blocks(): mend step")
            kept, other = (tree_leaves(s) for s in (after, by_pieces))
            if len(kept) != len(other):
                raise ConformanceError("pieces: step and blocks() keep another state: mend step.")
            for a, b in zip(kept, other, strict=True):
                if isinstance(a, Tensor):
                    self.require("pieces", _difference(b, a), "step and blocks() keep another state: mend step")
            state = after

    def purity(self) -> None:
        model = self.model
        before = list(_tensors_on_modules(model))  # held, so that no new tensor can have the id of one of them
        weights = [(name, x, x._version) for name, x in _named(model) if not x.is_inference()]
        state = model.initial_state()
        for group in model.groups(self.length):
            x = self.source[:, :, group.takes]
            copies = [s.clone() for s in tree_leaves(state) if isinstance(s, Tensor)]
            with torch.no_grad():
                first, after = model.step(x, state)
                again, _ = model.step(x, state)
            kept = [s for s in tree_leaves(state) if isinstance(s, Tensor)]
            if not torch.equal(first, again) or any(not torch.equal(a, b) for a, b in zip(copies, kept, strict=True)):
                raise ConformanceError(
                    f"purity: the step that takes {group.takes} changes its state, or differs when repeated. Change "
                    "nothing in place in step or blocks(); in a cache that the VAE changes, pass a copy."
                )
            state = after
        if any(all(x is not y for y in before) for x in _tensors_on_modules(model)):
            raise ConformanceError(
                "purity: step leaves tensors on the model's modules; all memory must be in the state that it returns."
            )
        changed = next((name for name, x, version in weights if x._version != version), None)
        if changed is not None:
            raise ConformanceError(f"purity: step changes '{changed}' of the VAE, whose weights and buffers must stay.")

    def samples(self) -> None:
        with torch.no_grad():
            alone = torch.cat([self.model.run(x) for x in self.source.split(1)])
            together = self.model.run(self.source)
        self.require("samples", _difference(together, alone), "samples of a batch mix: mend the state's batch axis")

    def gradients(self) -> None:
        model, count = self.model, len(self.model.groups(self.length))
        names = {id(p): name for name, p in model.vae.named_parameters()}
        with requiring_grad([p for p in model.vae.parameters() if p.is_floating_point()]):
            # Through the VAE's own method, so that a step that cuts the graph between groups is noticed.
            every = [p for p in model.vae.parameters() if p.is_floating_point()]
            plain = dict(zip(map(id, every), self._gradient(model.own, every)[1], strict=True))
            listed = list(model.parameters())
            known = {id(p) for p in listed}
            left_out = [names[key] for key, g in plain.items() if g is not None and key not in known]
            if left_out:
                raise ConformanceError(
                    f"parameters: {', '.join(left_out[:3])}{' and more' * (len(left_out) > 3)} get a gradient by plain "
                    "back-propagation, but parameters() leaves them out: let modules() return the modules of a step."
                )
            of_source = self._gradient(model.own, [])[0]
            strategies: list[Strategy] = [
                Full(),
                Exact(every=2),
                Exact(offload=True),
                Chop(count),
                Chop(count, block=2),
            ]
            strategies += [Chop(count, block=2, recompute=True)]
            if model.is_composed:
                strategies += [Exact(pieces=True), Exact(offload=True, pieces=True, every=2)]
                strategies += [Chop(count, block=2, recompute=True, pieces=True)]
            for strategy in strategies:
                got, of_parameters = self._gradient(_by(model, strategy), listed)
                where = "blocks()" if strategy.plan().pieces else "step"
                self.require(
                    "exact gradient",
                    _difference(got, of_source),
                    f"with {strategy} that of {model.entering} differs from ordinary back-propagation: mend {where}; "
                    "is something detached, kept outside the state, or passed to per_frame() though it mixes frames?",
                )
                tiny = torch.finfo(got.dtype).tiny  # where every frame is clamped, all gradients are zero
                scale = max((g.norm().item() for g in of_parameters if g is not None), default=1.0)
                for p, g in zip(listed, of_parameters, strict=True):
                    expected = plain.get(id(p))
                    zero = torch.zeros_like(p)
                    a, b = (zero if x is None else x for x in (g, expected))
                    self.require(
                        "exact gradient of weights",
                        ((a - b).norm() / max(b.norm().item(), 1e-4 * scale, tiny)).item(),
                        f"with {strategy} that of '{names.get(id(p), '?')}' differs from ordinary back-propagation: "
                        f"mend {where}",
                    )
        kept, rebuilt = (self._gradient(_by(model, Chop(1, recompute=r)), [])[0] for r in (False, True))
        self.require(
            "recomputation",
            _difference(rebuilt, kept),
            "a step that is repeated has another gradient than the first: mend it",
        )

    def checkpoints(self) -> None:
        if not self.model.is_composed:
            return
        expected = self._gradient(self.model.own, [])[0]
        for mode in ("frame", "residual", "block"):
            model = copy(self.model)
            model.checkpoint = mode  # type: ignore[assignment]
            for strategy in (Full(), Exact(pieces=True)):
                self.require(
                    "checkpoint",
                    _difference(self._gradient(_by(model, strategy), [])[0], expected),
                    f"checkpoint='{mode}' with {strategy} has another gradient: mend what blocks() closes over, or "
                    "what it passes to recomputed() and per_frame() (which is for what never mixes frames)",
                )

    def _gradient(self, run: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        leaf = self.source.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parameters get gradients, too
            value = (run(leaf) * self.adjoint).sum()
        if not value.requires_grad:
            raise ConformanceError("exact gradient: nothing reaches the source: is something in step detached?")
        found = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True)
        return torch.zeros_like(leaf) if found[0] is None else found[0], list(found[1:])


def _by(model: Recurrence, strategy: Strategy) -> Callable[[Tensor], Tensor]:
    return lambda x: run_whole(model, x, strategy)


def _verb(model: Recurrence) -> str:
    return "decode" if model.part == "decoder" else "encode"


def _longest(model: Recurrence) -> int:
    """What runs in three groups, at least four of what a step takes."""
    two = two_groups(model)
    for length in range(max(4, two), 4 * two + 8):
        try:
            if len(model.groups(length)) >= 3:
                return length
        except ValueError:
            continue
    return two


def _difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)).item()


def _named(model: Recurrence) -> Iterator[tuple[str, Tensor]]:
    yield from model.vae.named_parameters()
    yield from model.vae.named_buffers()


def _tensors_on_modules(model: Recurrence) -> Iterator[Tensor]:
    for module in model.vae.modules():
        yield from (x for x in tree_leaves(tensors_on(module)) if isinstance(x, Tensor))
