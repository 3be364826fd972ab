"""What a strategy will cost, before anything is run: peak memory predicted with tensors that have shapes but no data.

The architecture is built without weights and the library's own sweep runs on it (``chopgrad.shapes``), so a prediction
is about the code that will run: ``chopgrad.frame_loss``, whose loss sees one frame group at a time, or
``chopgrad.decode`` and a loss on the whole video. Left out: cuDNN's workspaces, the allocator's fragmentation, the CUDA
context, and the backbone that produces the latents. PyTorch rounds blocks of pinned host memory up to powers of two, so
that up to twice the host bytes may be taken.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, isqrt
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chopgrad.decode import decode
from chopgrad.decoders import DECODERS, CausalDecoder, Checkpoint, decoder_for
from chopgrad.loss import frame_loss, framewise
from chopgrad.memory import LiveStorages
from chopgrad.shapes import ShapesOnly
from chopgrad.strategies import Chop, Exact, Full, Sampled, Strategy

_WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", {}),
    "wan2.2": ("AutoencoderKLWan", _WAN22),
    "qwen-image": ("AutoencoderKLQwenImage", {"dim_mult": [1, 2, 4, 4]}),  # diffusers 0.36 fails on its own default
    "cogvideox": ("AutoencoderKLCogVideoX", {}),
}
"""The published architectures: class, and what differs from its defaults."""
MARGIN = 0.05
"""Share of a memory budget that ``recommend`` leaves free."""

FramesLoss = Literal["streamed", "whole"]
"""What a loss sees: the frames of one group at a time (``frame_loss``), or the whole video (``decode``)."""


@dataclass(frozen=True)
class Prediction:
    """Cost of one strategy for one video.

    Attributes:
        strategy: the strategy.
        checkpoint: what the decoder recomputes inside a group (``decoder_for(vae, checkpoint=...)``).
        device_bytes: predicted peak on the device, the decoder's weights included.
        host_bytes: predicted peak of what waits in host memory.
        relative_compute: forward and backward passes of the decoder (a backward counts as two forwards), as a ratio to
            full back-propagation; the ends of the video are ignored.
        distance: truncation distance in frame groups; None for an exact gradient.
    """

    strategy: Strategy
    device_bytes: int
    host_bytes: int
    relative_compute: float
    distance: int | None
    checkpoint: Checkpoint = None


def default_strategies(groups: int) -> list[Strategy]:
    """What is worth considering for a video of so many frame groups."""
    return [
        Full(),
        Exact(),
        Exact(offload=True),
        Exact(offload=True, pieces=True),
        Exact(offload=True, pieces=True, every=max(2, isqrt(groups))),
        Exact(pieces=True, every=max(2, isqrt(groups))),
        *(Chop(d) for d in (0, 1, 2, 4)),
        Chop(1, block=4),
        Chop(1, block=4, recompute=True),
        Chop(1, block=4, recompute=True, offload=True, pieces=True),
        Chop(1, recompute=True, offload=True, pieces=True),
    ]


def plan(
    vae: str,
    frames: int,
    height: int,
    width: int,
    *,
    loss: str = "mse",
    frames_loss: FramesLoss = "streamed",
    dtype: torch.dtype = torch.bfloat16,
    trainable_decoder: bool = False,
    subfolder: str | None = None,
    strategies: Sequence[Strategy] | None = None,
    checkpoint: Checkpoint | Literal["best"] = "best",
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predict memory and compute of strategies for a video of ``frames`` frames of ``height`` x ``width`` pixels.

    Args:
        vae: a name in ``ARCHITECTURES``, a folder with a config.json, or a hub id.
        loss: ``"mse"``, or ``"lpips"`` (the shapes of VGG-16, frame by frame with recomputation).
        frames_loss: ``"streamed"``: ``chopgrad.frame_loss`` with a target that is made group by group; ``"whole"``:
            ``chopgrad.decode`` and one loss on the video, so that the frames, the target, their gradient and the loss's
            own graph are counted whole.
        trainable_decoder: gradients of all decoder parameters are wanted too.
        subfolder: where the VAE lies inside a pipeline's folder or hub id.
        strategies: default: ``default_strategies``. An ``Exact`` whose ``every`` is left open is taken to keep every
            state.
        checkpoint: what the decoder recomputes inside a group; ``"best"``: nothing, and for strategies that walk pieces
            also ``"frame"``.
        progress: called with the number of predictions made and that of all, before each and at the end.

    Raises:
        ValueError: unknown VAE, loss or form, or frames or size that it does not decode to; the message says what fits.
            ``Sampled``, whose cost depends on its draw.

    Cost: a second or two per strategy. The peak of each phase (the forward pass, the loss, the backward pass) is linear
    in the number of groups once a strategy's window is full, so two short videos tell the line of each, and the highest
    at the video's length is the peak; with ``every`` the states that are not kept are taken off it.
    """
    if frames_loss not in get_args(FramesLoss):
        raise ValueError(f"frames_loss must be 'streamed' or 'whole', got {frames_loss!r}.")
    with ShapesOnly(), torch.device("meta"):
        model = _build(vae, dtype, subfolder).eval().requires_grad_(trainable_decoder)
        decoder = decoder_for(model, checkpoint=None)
        latent_frames = _latent_frames(decoder, frames)
        factor = _spatial_factor(decoder, dtype)
        if min(height, width) < 1 or height % factor or width % factor:
            raise ValueError(f"Height and width must be multiples of {factor}, got {height}x{width}.")
        size = (height // factor, width // factor)
        groups = len(decoder.frame_groups(latent_frames))
        weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
        loss_fn = _loss(loss, (height, width), dtype)

        @lru_cache
        def setting(checkpoint: Checkpoint) -> _Setting:
            decoder = decoder_for(model, checkpoint=checkpoint)
            return _Setting(decoder, size, (height, width), loss_fn, frames_loss, dtype)

        rows: list[tuple[Strategy, Checkpoint]] = []
        for strategy in default_strategies(groups) if strategies is None else strategies:
            if isinstance(strategy, Sampled):
                raise ValueError(f"What {strategy} takes depends on its draw: pass the strategy inside it.")
            best: tuple[Checkpoint, ...] = (None, "frame") if strategy.plan().pieces else (None,)
            rows += [(strategy, inside) for inside in (best if checkpoint == "best" else (checkpoint,))]
        predictions: list[Prediction] = []
        for strategy, inside in rows:
            if progress is not None:
                progress(len(predictions), len(rows))
            # The first block reaches over all groups from here on, and later ones have fewer before them.
            exact = not isinstance(strategy, Chop) or strategy.block + strategy.distance >= groups
            distance = None if exact else strategy.plan().distance
            device, host = setting(inside).peaks(strategy, latent_frames)
            compute = relative_compute(strategy, groups, frames_loss)
            compute += 0 if inside in (None, "frame") else _once_more(strategy, groups)
            predictions.append(Prediction(strategy, weights + device, host, compute, distance, inside))
        if progress is not None:
            progress(len(rows), len(rows))
        return predictions


def recommend(
    predictions: Sequence[Prediction], budget_bytes: int, host_budget_bytes: int | None = None
) -> Prediction | None:
    """The cheapest exact strategy that fits; else the truncated one of largest distance; else None.

    Of equally cheap ones, the one that needs least on the device.

    Args:
        budget_bytes: device memory; ``MARGIN`` of it is left free, for what a prediction may be off.
        host_budget_bytes: host memory; a prediction counts twice, because pinned blocks are rounded up to powers of
            two. Default: any.
    """
    fitting = [p for p in predictions if p.device_bytes <= (1 - MARGIN) * budget_bytes]
    if host_budget_bytes is not None:
        fitting = [p for p in fitting if 2 * p.host_bytes <= host_budget_bytes]
    exact = [p for p in fitting if p.distance is None]
    if exact:
        return min(exact, key=lambda p: (round(p.relative_compute, 2), p.device_bytes, p.host_bytes))
    return max(fitting, key=lambda p: (p.distance or 0, -p.relative_compute), default=None)


def relative_compute(strategy: Strategy, groups: int, frames_loss: FramesLoss = "streamed") -> float:
    """(forwards + 2 backwards) / 3 per group, by the table in ``chopgrad.strategies``."""
    settings = strategy.plan()
    block = min(settings.block or groups, groups)
    visits = 1 + min(settings.distance, groups - 1) / block  # reverse visits of a group
    forwards = 1.0
    # ``decode`` keeps states for one block of all groups; for others its backward pass decodes the video once more.
    streams = frames_loss == "streamed" or settings.block is not None
    if frames_loss == "whole" and settings.block is not None:
        forwards += 1
    if settings.recompute:
        # A visit rebuilds the graph; by pieces it first runs forward to have their inputs. Where groups stream by, the
        # last one of a window is visited at once, which saves one of its passes.
        forwards += (2 if settings.pieces else 1) * visits - (1 / block if streams else 0)
        forwards += 1 - 1 / (settings.every or 1)
    return (forwards + 2 * visits) / 3


def _once_more(strategy: Strategy, groups: int) -> float:
    """What one more forward pass in every backward pass adds to ``relative_compute``; pieces are not recomputed."""
    settings = strategy.plan()
    block = min(settings.block or groups, groups)
    return 0.0 if settings.pieces else (1 + min(settings.distance, groups - 1) / block) / 3


Peaks = tuple[int, int]
"""(device, host) bytes."""


@dataclass(eq=False)
class _Setting:
    """Everything but strategy and length."""

    decoder: CausalDecoder
    latent_size: tuple[int, int]
    size: tuple[int, int]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    frames_loss: FramesLoss
    dtype: torch.dtype

    def peaks(self, strategy: Strategy, latent_frames: int) -> Peaks:
        """What it takes beyond the weights."""
        settings = strategy.plan()
        groups = self.decoder.frame_groups(latent_frames)
        if settings.every is not None and settings.every > 1:
            device, host = self.peaks(Exact(settings.offload, pieces=settings.pieces), latent_frames)
            kept = ceil(len(groups) / settings.every) + min(settings.every, len(groups))
            dropped = max(0, len(groups) - kept) * self._state_bytes()
            return (device, host - dropped) if settings.offload else (device - dropped, host)
        step = groups[-1].latents.stop - groups[-1].latents.start
        if settings.block is None:
            enough = 4 + settings.recompute
        else:
            # With Wan the first two groups are smaller than the others, with CogVideoX none is, but the first has no
            # state; then come the first window of full size and the group that it hands its state to.
            begin = 2 if groups[0].frame_count < groups[-1].frame_count else 1
            enough = (ceil(begin / settings.block) + 1) * settings.block + settings.distance + 1
        beyond = len(groups) - enough
        if beyond <= 1:
            return _highest(self._run(strategy, latent_frames))
        short = self._run(strategy, latent_frames - step * beyond)
        if settings.block is not None and self.frames_loss == "streamed":
            # Forward and backward pass alternate, and only latents and their gradient are as long as the video.
            device, host = _highest(short)
            return device + beyond * 2 * step * self._latents(1).nbytes, host
        longer = self._run(strategy, latent_frames - step * (beyond - 1))
        phases = zip(short, longer, strict=True)
        return _highest([(a + beyond * (c - a), b + beyond * (d - b)) for (a, b), (c, d) in phases])

    @lru_cache  # noqa: B019  (lives as long as the call of plan)
    def _run(self, strategy: Strategy, latent_frames: int) -> list[Peaks]:
        """The peaks of each phase: until the frames have their adjoints, and after; of a whole video's loss more."""
        decoder, z = self.decoder, self._latents(latent_frames).requires_grad_()
        sources = [z, *(p for p in decoder.parameters() if p.requires_grad)]
        last = decoder.frame_groups(latent_frames)[-1].frames
        phases: list[Peaks] = []

        def target(frames: slice) -> Tensor:
            return torch.zeros(1, 3, frames.stop - frames.start, *self.size, dtype=self.dtype)

        def end_phase(adjoint: Tensor | None = None) -> None:
            phases.append((storages.peak["meta"] + z.nbytes, storages.peak["cpu"]))
            storages.peak = defaultdict(int, storages.live)

        def of_group(frames: Tensor, part: tuple[Tensor, slice]) -> Tensor:
            if part[1] == last:
                frames.register_hook(end_phase)
            return self.loss_fn(frames, part[0])

        with LiveStorages() as storages, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parameters get gradients too is what was asked for
            if self.frames_loss == "streamed":
                loss = frame_loss(decoder, z, lambda at: (target(at), at), of_group, strategy)
            else:
                whole = target(slice(0, last.stop))
                frames = decode(decoder, z, strategy)
                end_phase()
                frames.register_hook(end_phase)
                loss = self.loss_fn(frames, whole)
                end_phase()
            torch.autograd.grad(loss, sources)
            end_phase()
        return phases

    def _latents(self, latent_frames: int) -> Tensor:
        return torch.zeros(1, self.decoder.latent_channels, latent_frames, *self.latent_size, dtype=self.dtype)

    @lru_cache  # noqa: B019
    def _state_bytes(self) -> int:
        """Of the state after some groups, which is as large as any."""
        z, state = self._latents(6), self.decoder.initial_state()
        with torch.no_grad():
            for group in self.decoder.frame_groups(z.shape[2]):
                _, state = self.decoder.step(z[:, :, group.latents], state)
        return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor))


def _highest(phases: Sequence[Peaks]) -> Peaks:
    device, host = (max(peaks) for peaks in zip(*phases))
    return device, host


def _build(vae: str, dtype: torch.dtype, subfolder: str | None) -> nn.Module:
    if vae in ARCHITECTURES:
        name, config = ARCHITECTURES[vae]
    else:
        config = _config(vae, subfolder)
        name = config.get("_class_name", "")
        if name not in DECODERS:
            raise ValueError(f"'{vae}' is a {name or 'model of unknown class'}; supported are {', '.join(DECODERS)}.")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(diffusers, name).from_config(config)
    finally:
        torch.set_default_dtype(previous)


def _config(vae: str, subfolder: str | None) -> dict[str, Any]:
    folder = Path(vae)
    names = f"pass {', '.join(ARCHITECTURES)}, a folder with a config.json, or a hub id"
    try:
        if folder.is_dir():
            config = json.loads((folder / (subfolder or "") / "config.json").read_text())
        else:
            config = diffusers.AutoencoderKLWan.load_config(vae, subfolder=subfolder)
    except (OSError, ValueError) as error:
        inside = f" in its subfolder '{subfolder}'" if subfolder else ""
        raise ValueError(
            f"No config was found for '{vae}'{inside}: {names} (a pipeline's with --subfolder vae)."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"The config of '{vae}' is not one of a model: {names}.")
    return config


def _latent_frames(decoder: CausalDecoder, frames: int) -> int:
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}.")
    latent_frames = next(n for n in range(1, frames + 1) if decoder.frame_count(n) >= frames)
    if decoder.frame_count(latent_frames) != frames:
        near = sorted({decoder.frame_count(n) for n in (max(1, latent_frames - 1), latent_frames)})
        raise ValueError(f"No number of latents decodes to {frames} frames: pass {' or '.join(map(str, near))}.")
    return latent_frames


def _spatial_factor(decoder: CausalDecoder, dtype: torch.dtype) -> int:
    with torch.no_grad():
        return decoder.decode(torch.zeros(1, decoder.latent_channels, 1, 2, 2, dtype=dtype)).shape[-1] // 2


def _loss(name: str, size: tuple[int, int], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "mse":
        return nn.functional.mse_loss
    if name == "lpips":
        if min(size) < 16:
            raise ValueError(f"LPIPS needs frames of at least 16x16 pixels, got {size[0]}x{size[1]}.")
        return framewise(_VGGFeatures(dtype))
    raise ValueError(f"The loss must be mse or lpips, got '{name}'.")


class _VGGFeatures(nn.Module):
    """The shapes of LPIPS with VGG-16 (Zhang et al. 2018): what its graph keeps, without its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(m for a, b in pairwise(w) for m in (nn.Conv2d(a, b, 3, padding=1, dtype=dtype), nn.ReLU())))
            for w in widths
        )
        self.requires_grad_(False)

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        x, y = (v.transpose(1, 2).flatten(0, 1) for v in (frames, target))
        total = x.new_zeros(())
        for k, stage in enumerate(self.stages):
            if k:
                x, y = (nn.functional.max_pool2d(v, 2) for v in (x, y))
            x, y = stage(x), stage(y)
            difference = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
            total = total + difference.square().sum(1).mean()
        return total
