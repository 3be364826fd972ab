"""A causal-cache video decoder seen as a recurrence: ``(frames, state) = step(latent_group, state)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

State = Any
"""A pytree whose tensor leaves are the causal cache; other leaves (None, markers) pass through untouched."""

Features = tuple[Tensor, ...]
"""What one piece of a step hands to the next: the main features first, then what a later piece needs (skips)."""

Piece = Callable[[Features, Any], tuple[Features, Any]]
"""A pure part of a step: ``(features, its slice of the state) -> (features, the slice for the next group)``."""

Blocks = list[list[list[Piece]]]
"""A decoder's blocks, each a list of units (a residual block, an attention, an upsampler), each a list of pieces."""

Checkpoint = Literal["auto", "frame", "residual", "block"] | None


class FrameGroup(NamedTuple):
    """One step of the recurrence: which latents it takes and which video frames it yields."""

    latents: slice
    frames: slice

    @property
    def frame_count(self) -> int:
        return self.frames.stop - self.frames.start


class CausalDecoder(ABC):
    """A video VAE's decoder as a pure recurrence over frame groups (arXiv 2603.17812, Sec. 3.1).

    To support a new VAE write this class's abstract methods, and either ``blocks`` or ``step``, in one file and
    register it in ``chopgrad.decoders.DECODERS``; ``chopgrad.conformance.check_decoder`` then checks it against the
    VAE's own decode.

    Args:
        vae: the diffusers model, used in place: nothing is copied and no module attribute is changed.
        clamp: apply the clamp to [-1, 1] with which some VAEs end their decode. It zeroes the gradient of saturated
            pixels, as it does in the VAE's own decode; False leaves it out.
        checkpoint: recompute parts of a step in the backward pass (non-reentrant checkpointing), in every graph, also
            without ``frame_loss``; the gradient is the same. ``"block"`` keeps only what enters each resolution level,
            ``"residual"`` what enters each residual block, attention and upsampler: one more forward pass, and less A
            for the strategies that keep whole groups. ``"frame"`` recomputes norms, activations and Wan's spatial
            upsampling, frame by frame unless frames are mixed (CogVideoX's norm): it costs no causal convolution
            again, lowers the peak of a single piece too, and so goes with ``pieces=True``. ``"auto"``: ``"frame"``
            where pieces are walked, else None.
    """

    package: ClassVar[str | None] = None
    """Where ``decoder_for`` expects the VAE's class to come from; None: anywhere."""

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto") -> None:
        if checkpoint not in ("auto", None, "frame", "residual", "block"):
            raise ValueError(f"checkpoint must be 'auto', 'frame', 'residual', 'block' or None, got {checkpoint!r}.")
        self.vae: Any = vae  # a diffusers model: its attributes are not typed
        self.clamp, self.checkpoint = clamp, checkpoint
        self.passed_by: list[tuple[str, nn.Module]] = []
        """Modules that the VAE's own decode calls and a step does not, by name: see ``decoder_for``."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents that ``step`` takes."""

    @abstractmethod
    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        """The groups that ``latent_frames`` latents decode in, in order; they tile latents and frames exactly.

        Raises:
            ValueError: when the decoder cannot decode that many latents.
        """

    def blocks(self) -> Blocks:
        """The chain of pure pieces that ``step`` is, from ``(z,)`` to ``(frames,)``; the state has a slice for each.

        Small pieces lower the peak of strategies that walk them (``pieces=True``); units and blocks are what
        ``checkpoint`` recomputes at once. A decoder that cannot be taken apart overrides ``step`` instead.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not composed of pieces: use a strategy without pieces=True, and no checkpoint."
        )

    def pieces(self) -> list[Piece]:
        """The pieces of all blocks in order."""
        return [piece for block in self.blocks() for unit in block for piece in unit]

    def for_pieces(self) -> Self:
        """The same decoder with what ``checkpoint="auto"`` means where pieces are walked."""
        if self.checkpoint != "auto":
            return self
        walked = copy(self)
        walked.checkpoint = "frame"
        return walked

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one frame group.

        Pure: neither ``state`` nor the model is changed, so a step may be repeated to rebuild its graph.

        Args:
            z: [batch, channels, latents of the group, h, w], in the VAE's own latent space.
            state: what the step before returned, or ``initial_state()``.

        Returns:
            frames [batch, 3, frames of the group, H, W] and the state for the next group.
        """
        features: Features = (z,)
        after: list[Any] = []
        for segment in self._segments():
            before = state[len(after) : len(after) + len(segment)]
            if self.checkpoint in ("residual", "block") and torch.is_grad_enabled():
                features, new = checkpoint(_run, segment, features, before, use_reentrant=False)
            else:
                features, new = _run(segment, features, before)
            after += new
        return features[0], tuple(after)

    def _segments(self) -> list[list[Piece]]:
        """The pieces that are recomputed together: those of a block, of a unit, or all where neither is asked for."""
        if self.checkpoint == "block":
            return [[piece for unit in block for piece in unit] for block in self.blocks()]
        if self.checkpoint == "residual":
            return [unit for block in self.blocks() for unit in block]
        return [self.pieces()]

    def _recomputed(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, run again in the backward pass with ``checkpoint="frame"``."""
        if self.checkpoint == "frame" and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _per_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The same for a function that treats frames alone, which are then run one by one."""
        if self.checkpoint != "frame":
            return function(x)
        return torch.cat([self._recomputed(function, frame) for frame in x.split(1, dim=2)], dim=2)

    @abstractmethod
    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents in the diffusion model's normalised space -> the VAE's own space, as the pipelines do it."""

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """Inverse of ``denormalize``: what the VAE encodes -> what the diffusion model sees."""

    def initial_state(self) -> State:
        """The state before the first group: an empty cache."""
        return None

    def own_decode(self, latents: Tensor) -> Tensor:
        """The frames of the VAE's own ``decode``, of which this decoder is the recurrence; also where it is patched."""
        return _unpatched_decode(self.vae)(latents, return_dict=False)[0]

    def answer(self, decode: Callable[[Tensor], Tensor], z: Tensor, return_dict: bool = True) -> Any:
        """What stands in place of the VAE's own ``decode`` (``chopgrad.patch``): the same arguments and results.

        Args:
            decode: latents -> frames.
            z, return_dict: those of the call.
        """
        sliced = self.vae.use_slicing and z.shape[0] > 1
        frames = torch.cat([decode(part) for part in (z.split(1) if sliced else (z,))])
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``step`` uses."""
        yield from self.vae.decoder.parameters()
        if self.vae.post_quant_conv is not None:
            yield from self.vae.post_quant_conv.parameters()

    def prepare(self) -> None:
        """Before frames are decoded, as the VAE's own ``decode`` does it: bring offloaded weights to their device.

        Raises:
            ValueError: the VAE was changed meanwhile in a way that a step would pass by.
        """
        self.onload()
        if getattr(self.vae, "use_tiling", False):
            raise ValueError(
                "The VAE tiles (enable_tiling), so that its own decode blends other frames: call vae.disable_tiling(). "
                "Exact(offload=True, pieces=True) needs less memory than tiles with a gradient do."
            )
        check_hooks(self.passed_by)

    def onload(self) -> None:
        """Bring weights to their device that a pipeline's ``enable_model_cpu_offload`` keeps elsewhere."""
        offloading: Any = getattr(self.vae, "_hf_hook", None)  # accelerate's, which only the VAE's own decode calls
        if hasattr(offloading, "pre_forward"):
            offloading.pre_forward(self.vae)

    def frame_count(self, latent_frames: int) -> int:
        """Number of video frames that ``latent_frames`` latents decode to."""
        return self.frame_groups(latent_frames)[-1].frames.stop

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [batch, channels, latent_frames, h, w] by the recurrence; equals the VAE's own decode."""
        self.prepare()
        state, frames = self.initial_state(), []
        for group in self.frame_groups(latents.shape[2]):
            x, state = self.step(latents[:, :, group.latents], state)
            frames.append(x)
        return torch.cat(frames, dim=2)

    def _finish(self, frames: Tensor) -> Tensor:
        return frames.clamp(-1.0, 1.0) if self.clamp else frames


def is_patched(vae: Any) -> bool:
    """Whether ``vae.decode`` is that of ``chopgrad.patch``."""
    return type(vars(vae).get("decode")).__module__ == "chopgrad.patch"


def _unpatched_decode(vae: Any) -> Any:
    if is_patched(vae):
        return type(vae).decode.__get__(vae)
    return getattr(vae.decode, "_torchdynamo_orig_callable", vae.decode)


def _run(pieces: Sequence[Piece], features: Features, state: Sequence[Any]) -> tuple[Features, list[Any]]:
    after = []
    for piece, before in zip(pieces, state, strict=True):
        features, new = piece(features, before)
        after.append(new)
    return features, after


def check_hooks(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises:
    ValueError: one of these modules has a hook, which would not be run.
    """
    for name, module in modules:
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        if any(getattr(module, kind, None) for kind in kinds) or "forward" in vars(module):
            raise ValueError(
                f"A hook on '{name}' of the VAE (or offloading by blocks) would not be run, because the decoder calls "
                "the convolutions and norms inside it one by one: remove it, or put it on these."
            )


def check_latent_frames(latent_frames: int) -> None:
    if latent_frames < 1:
        raise ValueError(f"At least one latent frame is needed, got {latent_frames}.")
