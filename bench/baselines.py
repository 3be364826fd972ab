"""What people do without this library: named values beside the strategies, run on the same decoder, latents and loss.

A baseline decodes a video in one or several parts. Each part says which pixels of the video it stands for; its share of
the loss is taken against those, back-propagated, and its graph is freed before the next part is decoded. So what a
baseline decodes and what its gradient is can be compared with full back-propagation, pixel by pixel.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from chopgrad import CausalDecoder, decoder_for
from chopgrad.memory import available_bytes

PIXELS = {"wan2.1": 8, "wan2.2": 16, "cogvideox": 8}
"""Pixels per latent, along height and width."""
TILE_MULTIPLE = 4
"""Latents: a tile of 4 k latents has a stride of 3 k, in whole latents, as upstream's blending assumes."""


class Part(NamedTuple):
    """Decoded frames with their graph, and which pixels of the video they stand for."""

    frames: Tensor
    share: float
    """Of the whole loss."""
    where: tuple[Any, ...] = (slice(None), slice(None), slice(None))
    """(frames, rows, columns), as slices or a list of frame numbers."""

    def of(self, video: Tensor) -> Tensor:
        """The same pixels of [batch, 3, frames, H, W]."""
        frames, rows, columns = self.where
        return video[:, :, frames, rows, columns]


@dataclass(frozen=True)
class Baseline(ABC):
    """How a loss is differentiated without this library."""

    exact: ClassVar[bool] = False
    """Whether the gradient is that of full back-propagation, by construction."""

    @abstractmethod
    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        """Decode [batch, channels, latent_frames, h, w]; each part is back-propagated before the next is asked for."""

    def refusal(self, architecture: str, height: int, width: int) -> str | None:
        """Why it cannot decode a video of this size with this architecture; None where it can."""
        return None


@dataclass(frozen=True)
class UpstreamCheckpointing(Baseline):
    """``vae.enable_gradient_checkpointing()`` of diffusers around full back-propagation.

    Used by CogVideoX fine-tuning scripts. Costs one more forward pass; the inputs of all blocks of the whole video
    stay, so memory still grows with the video. Exact. Wan has none: its cache is a list changed in place, which a
    repeated forward pass would find changed.
    """

    exact = True

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        decoder.vae.enable_gradient_checkpointing()
        try:  # it must still be on while the backward pass repeats the blocks
            yield Part(decoder.vae.decode(latents).sample, 1.0)
        finally:
            decoder.vae.disable_gradient_checkpointing()

    def refusal(self, architecture: str, height: int, width: int) -> str | None:
        if architecture.startswith("wan"):
            return "diffusers has no gradient checkpointing for Wan's VAE (`_supports_gradient_checkpointing = False`)."
        return None


@dataclass(frozen=True)
class SavedOnCpu(Baseline):
    """Full back-propagation under ``torch.autograd.graph.save_on_cpu``: every saved tensor waits in host memory.

    What PyTorch offers anyone who runs out of device memory. Exact. Costs a copy of all activations to the host and
    back (T A bytes each way, weights included), and as much host memory.
    """

    exact = True

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        # Left only after the backward pass, so that what the loss saves is moved too.
        with _save_on_cpu(latents.is_cuda):
            yield Part(decoder.decode(latents), 1.0)


def _save_on_cpu(pin_memory: bool) -> torch.autograd.graph.saved_tensors_hooks:
    """PyTorch's hooks of that name, but for pinned memory, of which the machine is left a half.

    Nothing else may run on a machine whose memory is pinned, and the kernel would end this process and others.

    Raises:
        MemoryError: in the forward pass, once half of the host memory that was free is pinned.
    """
    hooks = torch.autograd.graph.save_on_cpu(pin_memory)
    left = (available_bytes("cpu") or 2**62) // 2
    pack: Any = hooks.pack_hook

    def counted(x: Tensor) -> Any:
        nonlocal left
        left -= 1 << (x.nbytes - 1).bit_length() if pin_memory and x.nbytes else 0  # PyTorch rounds it up to that
        if left < 0:
            raise MemoryError("save_on_cpu would pin more than half of the host's free memory")
        return pack(x)

    hooks.pack_hook = counted
    return hooks


@dataclass(frozen=True)
class TiledDecode(Baseline):
    """``vae.enable_tiling()`` of diffusers, and full back-propagation through the blended tiles.

    Often recommended against running out of memory, and made for inference. Tiles of half the frame's height and width
    overlap by a quarter and are blended: all their graphs are kept, so in training it costs *more* memory and time than
    ``Full`` (the overlaps are decoded several times). Other frames than the plain decode near the seams.
    """

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        vae, (rows, columns) = decoder.vae, (_tile(n) for n in latents.shape[-2:])
        scale = int(getattr(vae.config, "scale_factor_spatial", 0) or PIXELS["cogvideox"])
        size = {"tile_sample_min_height": rows * scale, "tile_sample_min_width": columns * scale}
        before = {k: v for k, v in vars(vae).items() if k.startswith("tile_")}
        if hasattr(vae, "tile_sample_stride_height"):
            stride = {"tile_sample_stride_height": rows * scale * 3 // 4}
            vae.enable_tiling(**size, **stride, tile_sample_stride_width=columns * scale * 3 // 4)
        else:
            vae.enable_tiling(**size, tile_overlap_factor_height=0.25, tile_overlap_factor_width=0.25)
        try:
            frames = vae.decode(latents).sample
        finally:
            vae.disable_tiling()
            vars(vae).update(before)
        yield Part(frames, 1.0)

    def refusal(self, architecture: str, height: int, width: int) -> str | None:
        if all(n // PIXELS[architecture] <= TILE_MULTIPLE for n in (height, width)):
            return f"frames of {height}x{width} pixels are one tile."
        return None


@dataclass(frozen=True)
class SpatialTiles(Baseline):
    """Quarters of the frame, each decoded with a margin of one latent and back-propagated before the next one.

    The spatial truncation of arXiv 2603.17812 (Sec. 3.3), here without the temporal one. A quarter of the graph at a
    time, but for all T groups: memory still grows with the video. Norms over the whole frame and attention see only
    their tile, so frames and gradient differ from the plain decode.
    """

    margin: int = 1
    """Latents of context around a tile."""

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        height, width = latents.shape[-2:]
        for top, bottom in _halves(height):
            for left, right in _halves(width):
                upper, west = max(0, top - self.margin), max(0, left - self.margin)
                tile = latents[..., upper : bottom + self.margin, west : right + self.margin]
                frames = decoder.decode(tile)
                f = frames.shape[-1] // tile.shape[-1]
                inner = frames[..., (top - upper) * f : (bottom - upper) * f, (left - west) * f : (right - west) * f]
                where = (slice(None), slice(top * f, bottom * f), slice(left * f, right * f))
                yield Part(inner, (bottom - top) * (right - left) / (height * width), where)

    def refusal(self, architecture: str, height: int, width: int) -> str | None:
        if min(height, width) // PIXELS[architecture] < 2:
            return f"frames of {height}x{width} pixels have no quarters of whole latents."
        return None


@dataclass(frozen=True)
class IsolatedLatents(Baseline):
    """Every latent decoded on its own, without cache: DOVE's pixel-space stage (video super-resolution).

    Memory of one latent, whatever the length, and the cheapest backward pass. But a causal decoder takes a latent
    without history for the first of a video, which decodes to a single frame: T latents give T frames, not 1 + 4 (T-1),
    and they are other frames. Frame k is compared with the last frame of the group that latent k decodes to.
    """

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        count = latents.shape[2]
        last = decoder.frame_count(count) - 1
        for k in range(count):
            frames, _ = decoder.step(latents[:, :, k : k + 1], decoder.initial_state())
            yield Part(frames, 1 / count, ([round(k * last / max(1, count - 1))], slice(None), slice(None)))


@dataclass(frozen=True)
class FirstLatents(Baseline):
    """Only the first latents are decoded, by full back-propagation: reward training in VideoX-Fun.

    Constant memory and time, and the right frames, but the loss never sees the rest of the video and the other latents
    receive no gradient.
    """

    count: int = 3

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        frames = decoder.decode(latents[:, :, : self.count])
        yield Part(frames, 1.0, (slice(0, frames.shape[2]), slice(None), slice(None)))


TINY = "CHOPGRAD_TAEHV"
"""Environment variable: file of the class TAEHV, a colon, and its weights, such as ``taehv.py:taew2_1.pth``."""


@dataclass(frozen=True)
class TinyDecoder(Baseline):
    """A tiny decoder of the same latents (TAEHV) in place of the VAE's, by full back-propagation.

    Its graph is some hundredths of the VAE's, and still grows with the video. Its frames are approximations, so value
    and gradient are others; of random weights in the VAE only memory and time say anything. Its class and weights are
    not part of this project: ``CHOPGRAD_TAEHV`` says where they are.
    """

    def parts(self, decoder: CausalDecoder, latents: Tensor) -> Iterator[Part]:
        tiny = decoder_for(tiny_vae().to(latents), clamp=False, check=False)
        if tiny.latent_channels != decoder.latent_channels:
            raise ValueError(f"{TINY} decodes {tiny.latent_channels} channels, the VAE {decoder.latent_channels}.")
        yield Part(2 * tiny.decode(decoder.normalize(latents)) - 1, 1.0)

    def refusal(self, architecture: str, height: int, width: int) -> str | None:
        return None if os.environ.get(TINY) else f"n/a, its weights are not here ({TINY}=taehv.py:taew2_1.pth)."


@cache
def tiny_vae() -> Any:
    """What ``CHOPGRAD_TAEHV`` names, with frozen weights; its own code reads them.

    Raises:
        ValueError: there is no such thing.
    """
    source, _, weights = os.environ.get(TINY, "").partition(":")
    if not (Path(source).is_file() and Path(weights).is_file()):
        raise ValueError(f"{TINY} must name two files, the class's and its weights', as in taehv.py:taew2_1.pth.")
    spec = importlib.util.spec_from_file_location("chopgrad_taehv", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TAEHV(weights).eval().requires_grad_(False)


BASELINES: tuple[Baseline, ...] = (
    UpstreamCheckpointing(),
    SavedOnCpu(),
    TiledDecode(),
    SpatialTiles(),
    IsolatedLatents(),
    FirstLatents(),
    TinyDecoder(),
)


def differentiate(
    baseline: Baseline,
    decoder: CausalDecoder,
    latents: Tensor,
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients of latents and parameters) of a baseline; ``target`` may be in host memory."""
    inputs = [latents, *parameters]
    total = latents.new_zeros(())
    sums = [torch.zeros_like(x) for x in inputs]
    for part in baseline.parts(decoder, latents):
        loss = loss_fn(part.frames, part.of(target).to(latents.device)) * part.share
        for into, gradient in zip(sums, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True):
            if gradient is not None:
                into += gradient
        total += loss.detach()
        del loss, part  # the generator keeps the frames, autograd has freed the graph
    return total, sums


def _tile(latents: int) -> int:
    """Half of the frame, in latents, rounded up to what upstream's blending can do."""
    return TILE_MULTIPLE * max(1, -(-latents // (2 * TILE_MULTIPLE)))


def _halves(length: int) -> list[tuple[int, int]]:
    return [(0, length // 2), (length // 2, length)]
