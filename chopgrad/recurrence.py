"""A video model that runs group by group, each fed with features of the one before: ``y, state = step(x, state)``.

Decoders (``chopgrad.decoders``) and encoders (``chopgrad.encoders``) of video VAEs are such recurrences, and one engine
differentiates them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chopgrad.frozen import lean
from chopgrad.local import Features as Features
from chopgrad.local import Local
from chopgrad.local import Piece as Piece
from chopgrad.pieces.plain import has_hook

State = Any
"""A pytree whose tensor leaves are the causal cache; other leaves (None, markers) pass through untouched."""

Blocks = list[list[list[Piece]]]
"""A model's blocks, each a list of units (a residual block, an attention, an upsampler), each a list of pieces."""

Checkpoint = Literal["auto", "frame", "residual", "block"] | None


class PassedBy(NamedTuple):
    """A module that the VAE itself calls and a step does not."""

    name: str
    module: nn.Module
    kind: type
    """Its class when it was looked at."""


class Group(Protocol):
    """One step of the recurrence: which part of the time axis it takes, and which it yields."""

    @property
    def takes(self) -> slice: ...

    @property
    def yields(self) -> slice: ...


class Recurrence(ABC):
    """A model as a pure recurrence over groups (arXiv 2603.17812, Sec. 3.1).

    Args:
        vae: the model, used in place: nothing is copied and no module attribute is changed.
        checkpoint: recompute parts of a step in the backward pass (non-reentrant checkpointing), in every graph, also
            without ``frame_loss``; the gradient is the same. ``"block"`` keeps only what enters each resolution level,
            ``"residual"`` what enters each residual block, attention and resampler: one more forward pass, and less
            memory for the strategies that keep whole groups. ``"frame"`` recomputes norms, activations and Wan's
            spatial upsampling, frame by frame unless frames are mixed (CogVideoX's norm): it costs no causal
            convolution again, lowers the peak of a single piece too, and so goes with ``pieces=True``. ``"auto"``:
            ``"frame"`` where pieces are walked, but for classes whose norms keep their input only, else None.
    """

    package: ClassVar[str | None] = None
    """Where the VAE's class is expected to come from; None: anywhere."""
    part: ClassVar[str]
    """The VAE's submodule that a step runs: "decoder" or "encoder"."""
    entering: ClassVar[str]
    """What a step takes, in messages."""
    layout: str
    """Its shape, in messages."""
    own_methods: ClassVar[tuple[str, ...]] = ()
    """The VAE's methods that a step stands for: an override of them is refused."""
    recomputes_frames: ClassVar[bool] = True
    """Whether ``checkpoint="auto"`` means "frame" where pieces are walked; it is of no use where norms keep their input
    only."""
    row_unit: int = 1
    """Rows of the source that are one row where it is smallest: strips begin at multiples of them."""
    trial_size: int = 2
    """Height and width of what the trial in ``decoder_for`` and ``encoder_for`` runs on."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if vars(cls).get("step", Recurrence.step) is not Recurrence.step:  # of one piece
            cls.step = lean(cls.step)  # type: ignore[method-assign]

    def __init__(self, vae: nn.Module, checkpoint: Checkpoint = "auto") -> None:
        if checkpoint not in ("auto", None, "frame", "residual", "block"):
            raise ValueError(f"checkpoint must be 'auto', 'frame', 'residual', 'block' or None, got {checkpoint!r}.")
        self.vae: Any = vae  # a diffusers model: its attributes are not typed
        self.checkpoint = checkpoint
        self.chosen: dict[Any, Any] = {}
        """What ``Exact()`` chose, by shape of the source and what else it depends on (``chopgrad.automatic``)."""
        self.passed_by: list[PassedBy] = []
        """Modules that the VAE itself calls and a step does not, by name: see ``decoder_for``."""

    @property
    @abstractmethod
    def source_channels(self) -> int:
        """Of what ``step`` takes."""

    @abstractmethod
    def groups(self, length: int) -> Sequence[Group]:
        """The groups in which so many latents, or frames, are run, in order.

        What they yield tiles the time axis exactly. What they take covers it in order and may overlap: gradients add.

        Raises:
            ValueError: when the model cannot run on that many.
        """

    @abstractmethod
    def own(self, x: Tensor) -> Tensor:
        """What the VAE itself makes of x, also where it is patched: that of which this is the recurrence."""

    def blocks(self) -> Blocks:
        """The chain of pure pieces that ``step`` is, from ``(x,)`` to ``(y,)``; the state has a slice for each.

        Small pieces lower the peak of strategies that walk them (``pieces=True``); units and blocks are what
        ``checkpoint`` recomputes at once. A model that cannot be taken apart overrides ``step`` instead.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not composed of pieces: use a strategy without pieces=True, and no checkpoint."
        )

    @property
    def is_composed(self) -> bool:
        """Whether it is taken apart into pieces."""
        return type(self).blocks is not Recurrence.blocks

    def pieces(self) -> list[Piece]:
        """The pieces of all blocks in order, as they are run."""
        return [piece for block in self.lean_blocks() for unit in block for piece in unit]

    def lean_blocks(self) -> Blocks:
        """The blocks, in whose pieces frozen convolutions keep no input (``chopgrad.frozen``)."""
        return [[[lean_piece(piece) for piece in unit] for unit in block] for block in self.blocks()]

    def for_pieces(self) -> Self:
        """The same with what ``checkpoint="auto"`` means where pieces are walked."""
        if self.checkpoint != "auto" or not self.recomputes_frames:
            return self
        walked = copy(self)
        walked.checkpoint = "frame"
        return walked

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one group.

        Pure: neither ``state`` nor the model is changed, so a step may be repeated to rebuild its graph.

        Args:
            x: [batch, channels, what the group takes, h, w]: of a decoder latents in the VAE's own space, of an encoder
                frames.
            state: what the step before returned, or ``initial_state()``.

        Returns:
            What the group yields, [batch, channels, ..., H, W], and the state for the next group.
        """
        features: Features = (x,)
        after: list[Any] = []
        for segment in self._segments():
            before = state[len(after) : len(after) + len(segment)]
            if self.checkpoint in ("residual", "block") and torch.is_grad_enabled():
                features, new = checkpoint(walk, segment, features, before, use_reentrant=False)
            else:
                features, new = walk(segment, features, before)
            after += new
        return features[0], tuple(after)

    def _segments(self) -> list[list[Piece]]:
        """The pieces that are recomputed together: those of a block, of a unit, or all where neither is asked for."""
        if self.checkpoint == "block":
            return [[piece for unit in block for piece in unit] for block in self.lean_blocks()]
        if self.checkpoint == "residual":
            return [unit for block in self.lean_blocks() for unit in block]
        return [self.pieces()]

    def recomputed(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, run again in the backward pass with ``checkpoint="frame"``."""
        if self.checkpoint == "frame" and torch.is_grad_enabled():
            return checkpoint(lean(function), *inputs, use_reentrant=False)
        return function(*inputs)

    def per_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The same for a function that treats frames alone, which are then run one by one."""
        if self.checkpoint != "frame":
            return function(x)
        return torch.cat([self.recomputed(function, frame) for frame in x.split(1, dim=2)], dim=2)

    def initial_state(self) -> State:
        """The state before the first group: an empty cache."""
        return None

    def modules(self) -> list[nn.Module]:
        """The VAE's modules that ``step`` uses; those whose names say so, unless a subclass knows better.

        ``chopgrad.testing`` compares their parameters with those that a step is seen to use.
        """
        names = {"decoder": ("decoder", "post_quant_conv"), "encoder": ("encoder", "quant_conv")}[self.part]
        found = [getattr(self.vae, name, None) for name in names]
        return [module for module in found if isinstance(module, nn.Module)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``step`` uses, each once."""
        yield from {id(p): p for module in self.modules() for p in module.parameters()}.values()

    def prepare(self) -> None:
        """Before anything runs, as the VAE itself does it: bring offloaded weights to their device.

        Raises:
            ValueError: the VAE was changed meanwhile in a way that a step would pass by.
        """
        self.onload()
        self.check_windows()
        check_hooks(self.passed_by, self.part)

    def check_windows(self) -> None:
        """Raises:
        ValueError: the VAE is set to run in windows or tiles other than those that this recurrence walks.
        """
        if getattr(self.vae, "use_tiling", False):
            raise ValueError(
                "The VAE tiles (enable_tiling), so that it blends tiles, and gives something else: call "
                "vae.disable_tiling(). Exact(offload=True, pieces=True) needs less memory than tiles with a gradient."
            )

    def onload(self) -> None:
        """Bring weights to their device that a pipeline's ``enable_model_cpu_offload`` keeps elsewhere."""
        offloading: Any = getattr(self.vae, "_hf_hook", None)  # accelerate's, which only the VAE's own methods call
        if hasattr(offloading, "pre_forward"):
            offloading.pre_forward(self.vae)

    def run(self, x: Tensor) -> Tensor:
        """All groups of x, [batch, channels, length, h, w], in one graph; equals what the VAE itself gives.

        Raises:
            ValueError: a step gives another length than its group says, or the groups do not tile.
        """
        self.prepare()
        state, found = self.initial_state(), []
        for group in tiling(self, x.shape[2]):
            y, state = self.step(x[:, :, group.takes], state)
            count = group.yields.stop - group.yields.start
            if y.shape[2] != count:
                raise ValueError(
                    f"{type(self).__name__}: the step that takes {group.takes} gives {y.shape[2]} frames or latents, "
                    f"but its group says {count}."
                )
            found.append(y)
        return torch.cat(found, dim=2)


def lean_piece(piece: Piece) -> Piece:
    """A piece in which frozen convolutions keep no input."""
    return piece.within(lean) if isinstance(piece, Local) else lean(piece)


def tiling(model: Recurrence, length: int) -> Sequence[Group]:
    """The groups of so many latents or frames.

    Raises:
        ValueError: what they take does not cover the source in order, or what they yield does not tile the result.
    """
    groups = model.groups(length)
    covered = begun = end = 0
    for group in groups:
        takes, yields = group.takes, group.yields
        in_order = begun <= takes.start <= covered <= takes.stop and takes.start < takes.stop
        if not in_order or yields.start != end or yields.stop <= yields.start:
            raise ValueError(
                f"{type(model).__name__}: the groups of {length} {model.entering} must cover them in order, and tile "
                f"what they yield; {group} does not fit."
            )
        begun, covered, end = takes.start, takes.stop, yields.stop
    if covered != length:
        raise ValueError(f"{type(model).__name__}: the groups of {length} {model.entering} cover {covered} of them.")
    return groups


def is_patched(vae: Any, method: str = "decode") -> bool:
    """Whether ``vae.decode`` is that of ``chopgrad.patch``."""
    return type(vars(vae).get(method)).__module__ == "chopgrad.patch"


def unpatched(vae: Any, method: str) -> Any:
    """The VAE's own method: not ours, and not compiled."""
    if is_patched(vae, method):
        return getattr(type(vae), method).__get__(vae)
    found = getattr(vae, method)
    return getattr(found, "_torchdynamo_orig_callable", found)


def walk(pieces: Sequence[Piece], features: Features, state: Sequence[Any]) -> tuple[Features, list[Any]]:
    """Pieces one after the other: what the last one hands out, and the state's slices for the next group."""
    after = []
    for piece, before in zip(pieces, state, strict=True):
        features, new = piece(features, before)
        after.append(new)
    return features, after


def check_hooks(modules: Sequence[PassedBy], part: str) -> None:
    """Raises:
    ValueError: one of these modules has a hook, which would not be run, or has become another.
    """
    for name, module, kind in modules:
        if type(module) is not kind:
            raise ValueError(
                f"'{name}' of the VAE has become a {type(module).__name__} since decoder_for or encoder_for looked "
                "at it: call that again."
            )
        if has_hook(module) or "forward" in vars(module):
            raise ValueError(
                f"A hook on '{name}' of the VAE (or offloading by blocks) would not be run, because the {part} does "
                "not call it but what is inside it: remove it, or put it on a convolution or norm that is called."
            )
