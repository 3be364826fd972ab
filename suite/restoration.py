"""A small end task: restore a degraded clip in one step, with a pixel loss through the video decoder.

A clip is blurred, shrunk, enlarged and made noisy, and encoded by the VAE. A real ``WanTransformer3DModel`` in small
widths predicts what to add to these latents so that they decode to the clean clip: one step and no noise to start from,
as in the restoration tasks of arXiv 2603.17812, Sec. 4. It is big enough to learn something and small enough that the
gradient of every one of its parameters can be kept for a whole data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from chopgrad import CausalDecoder, FrameGroup, decoder_for
from suite.clips import TRAINING_CLIPS, packaged_clip, random_crop, read_frames, to_unit
from suite.motion import moving_clip
from suite.pairwise import pairwise_gradients
from suite.records import ROOT
from suite.vaes import load_vae

LossFn = Callable[[Tensor, Tensor], Tensor]
ZOOM = 1.5


@dataclass(frozen=True)
class TaskSettings:
    """The task and its backbone.

    Attributes:
        vae: ``wan2.1``, ``cogvideox``, a folder or a hub id.
        frames, size: frames, and height and width in pixels, of a clip.
        blur, shrink, noise: the degradation: standard deviation of the blur in pixels, factor of the shrinking,
            standard deviation of the noise (pixels lie in [-1, 1]).
        width, layers: inner width (a multiple of 32) and blocks of the backbone.
        warm_up_steps, warm_up_clips, warm_up_rate: Adam on the loss in latent space that makes the backbone which all
            measurements start from; pixel losses fine-tune in the paper too.
    """

    vae: str = "wan2.1"
    frames: int = 33
    size: int = 32
    blur: float = 1.5
    shrink: int = 4
    noise: float = 0.3
    width: int = 64
    layers: int = 2
    warm_up_steps: int = 300
    warm_up_clips: int = 48
    warm_up_rate: float = 1e-3

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        if self.frames < 1 or self.size < 1 or self.shrink < 1 or min(self.blur, self.noise) < 0:
            raise ValueError(
                "A task needs frames, size and shrink of at least 1, and blur and noise of at least 0; got "
                f"frames {self.frames}, size {self.size}, shrink {self.shrink}, blur {self.blur}, noise {self.noise}."
            )
        if self.width < 32 or self.width % 32 or self.layers < 1:
            raise ValueError(
                f"The backbone's width must be a multiple of 32 and layers at least 1, got {self.width} and "
                f"{self.layers}."
            )

    def described(self) -> dict[str, Any]:
        """As JSON values for a record; of an absolute path only the last part."""
        return asdict(self) | {"vae": Path(self.vae).name if Path(self.vae).is_absolute() else self.vae}


@dataclass(frozen=True)
class Samples:
    """Clips of the task.

    Attributes:
        sources: what each clip was cut from; clips of one film are alike (clusters of an interval).
        clean: [clips, 3, frames, H, W] in [-1, 1].
        condition, latents: [clips, channels, latent frames, h, w], degraded and clean, in the diffusion model's
            normalised space.
    """

    sources: list[str]
    clean: Tensor
    condition: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice | Tensor) -> Samples:
        chosen = torch.arange(len(self))[rows].tolist()
        return Samples([self.sources[k] for k in chosen], self.clean[rows], self.condition[rows], self.latents[rows])


class Restoration:
    """The task on one VAE: clips, backbone, prediction.

    Raises:
        ValueError: a setting is out of range, the VAE cannot be loaded, or does not decode to so many frames.
    """

    def __init__(self, settings: TaskSettings) -> None:
        settings.check()
        self.settings = settings
        self.vae: Any = load_vae(settings.vae)
        self.decoder: CausalDecoder = decoder_for(self.vae)
        counts = {self.decoder.frame_count(n): n for n in range(1, settings.frames + 1)}
        if settings.frames not in counts:
            near = sorted(counts, key=lambda n: abs(n - settings.frames))[:2]
            raise ValueError(
                f"{settings.frames} frames fit no number of latents of this VAE: pass {' or '.join(map(str, near))}."
            )
        self.groups: list[FrameGroup] = self.decoder.frame_groups(counts[settings.frames])

    def samples(self, count: int, seed: int, films: list[Path] | None = None) -> Samples:
        """Seeded clips.

        Args:
            films: crops of these in turn; of none, generated motion alone, whose clips are independent; None
                is the training diet, half generated and half crops of the training films.
        """
        generator = torch.Generator().manual_seed(seed)
        s, mixed = self.settings, films is None
        films = [packaged_clip(name) for name in TRAINING_CLIPS] if films is None else films
        sources, clean = [], []
        for k in range(count):
            if not films or (mixed and k % 2 == 0):
                sources.append(f"generated {seed}/{k}")
                clean.append(moving_clip(generator, s.frames, s.size, s.size))
            else:
                film = films[(k // 2 if mixed else k) % len(films)]
                sources.append(film.name)
                clean.append(_film_crop(film, s.frames, s.size, generator))
        pixels = torch.stack(clean)
        degraded = degrade(pixels, s, generator)
        return Samples(sources, pixels, self._encode(degraded), self._encode(pixels))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        parts = [self.decoder.normalize(self.vae.encode(x).latent_dist.mode()) for x in pixels.split(4)]
        return torch.cat(parts)

    def new_backbone(self, seed: int) -> Any:
        """A seeded backbone whose last layer is zero, so that it starts by returning its condition."""
        s, channels = self.settings, self.decoder.latent_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone: Any = WanTransformer3DModel(
                patch_size=(1, 1, 1), num_attention_heads=s.width // 32, attention_head_dim=32, in_channels=channels,
                out_channels=channels, text_dim=8, freq_dim=32, ffn_dim=4 * s.width, num_layers=s.layers,
            )  # fmt: skip
        for p in backbone.proj_out.parameters():
            nn.init.zeros_(p)
        return backbone

    def restore(self, backbone: nn.Module, condition: Tensor) -> Tensor:
        """[batch, channels, latent frames, h, w] normalised condition -> restored latents in the VAE's own space."""
        return self.decoder.denormalize(condition + _correction(backbone, condition))

    @torch.no_grad()
    def pixel_loss(self, backbone: nn.Module, samples: Samples, loss_fn: LossFn = F.mse_loss) -> list[float]:
        """The loss of each clip."""
        losses = []
        for k in range(0, len(samples), 4):
            part = samples[k : k + 4]
            decoded = self.decoder.decode(self.restore(backbone, part.condition))
            losses += [loss_fn(x[None], y[None]).item() for x, y in zip(decoded, part.clean, strict=True)]
        return losses

    def warmed_up(self, fingerprint: str, seed: int = 0, cache: Path = ROOT / "runs" / "restoration") -> nn.Module:
        """The backbone after its training in latent space; read back when the same one was trained before.

        Args:
            fingerprint: of the VAE's weights and the clips; with the settings, the seed and this file's code it names
                the cached file, so nothing is read back over a change.

        Cost: about 25 ms a step for the default settings on one core.
        """
        s = self.settings
        key = json.dumps([s.described(), fingerprint, seed, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()])
        path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        backbone = self.new_backbone(seed)
        if path.exists():
            backbone.load_state_dict(torch.load(path, weights_only=True))
            return backbone
        data = self.samples(s.warm_up_clips, seed=1_000_000 + seed)
        optimizer = torch.optim.Adam(backbone.parameters(), s.warm_up_rate)
        generator = torch.Generator().manual_seed(seed)
        bar = track(range(s.warm_up_steps), description="latent warm-up", console=Console(stderr=True))
        for _ in bar:
            rows = torch.randint(len(data), (4,), generator=generator)
            predicted = data.condition[rows] + _correction(backbone, data.condition[rows])
            optimizer.zero_grad()
            F.mse_loss(predicted, data.latents[rows]).backward()
            optimizer.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(backbone.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return backbone

    def latent_pairs(self, backbone: nn.Module, samples: Samples, loss_fn: LossFn) -> Tensor:
        """dL_i/dz_j of each clip's own loss: [clips, i, j, channels, latents per group, h, w].

        Cost: one decode of the batch and T backward passes; activations of the whole batch in memory.
        """
        with torch.no_grad():
            restored = self.restore(backbone, samples.condition)
        (pairs,) = pairwise_gradients(self.decoder, restored, samples.clean, [loss_fn])
        return pairs.movedim(2, 0) * len(samples)  # the loss is a mean over the batch

    def parameter_gradients(self, backbone: nn.Module, condition: Tensor, latent_gradients: Tensor) -> Tensor:
        """Gradients of the backbone's parameters from gradients of one clip's latents.

        One graph of the backbone serves all of them: the truncation ends where the backbone begins.

        Args:
            condition: [1, channels, latent frames, h, w].
            latent_gradients: [k, groups, channels, latents per group, h, w].

        Returns:
            [k, parameters].
        """
        parameters = list(backbone.parameters())
        restored = self.restore(backbone, condition)
        rows = []
        for gradient in latent_gradients:
            adjoint = join_groups(gradient, self.groups)[None]
            parts = torch.autograd.grad(restored, parameters, adjoint, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])
            )
        return torch.stack(rows)


def degrade(video: Tensor, settings: TaskSettings, generator: torch.Generator) -> Tensor:
    """Blur, shrink, enlarge, add noise: the degradation of super-resolution training, on [clips, 3, frames, H, W]."""
    frames = video.transpose(1, 2).flatten(0, 1)
    if settings.blur > 0:
        reach = max(1, round(3 * settings.blur))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / settings.blur) ** 2).to(video)
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        frames = F.conv2d(F.pad(frames, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3)
        frames = F.conv2d(F.pad(frames, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3), groups=3)
    if settings.shrink > 1:
        small = [max(1, n // settings.shrink) for n in frames.shape[-2:]]
        small_frames = F.interpolate(frames, size=small, mode="bicubic", antialias=True)
        frames = F.interpolate(small_frames, size=video.shape[-2:], mode="bicubic")
    frames = frames + settings.noise * torch.randn(frames.shape, generator=generator).to(video)
    return frames.clamp(-1, 1).unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


def join_groups(parts: Tensor, groups: list[FrameGroup]) -> Tensor:
    """[groups, channels, latents per group, h, w] -> [channels, latent frames, h, w]; unused places are dropped."""
    return torch.cat([x[:, : g.latents.stop - g.latents.start] for x, g in zip(parts, groups, strict=True)], dim=1)


def _correction(backbone: Any, condition: Tensor) -> Tensor:
    batch = len(condition)
    return backbone(
        hidden_states=condition,
        timestep=condition.new_zeros(batch, dtype=torch.long),
        encoder_hidden_states=condition.new_zeros(batch, 1, backbone.config.text_dim),
        return_dict=False,
    )[0]


def _film_crop(film: Path, frames: int, size: int, generator: torch.Generator) -> Tensor:
    video = _small_film(film, round(ZOOM * size))
    if video.shape[1] < frames:
        raise ValueError(f"'{film.name}' has {video.shape[1]} frames, but {frames} are needed: pass longer clips.")
    start = int(torch.randint(video.shape[1] - frames + 1, (), generator=generator))
    return random_crop(video[:, start : start + frames], size, size, generator, ZOOM)


@lru_cache(maxsize=8)
def _small_film(film: Path, short_side: int) -> Tensor:
    """[3, frames, H, W] of a whole film with its shorter side shrunk, some frames at a time: films are large."""
    raw = read_frames(film)
    factor = min(1.0, short_side / min(raw.shape[1:3]))
    size = [max(short_side, round(n * factor)) if factor < 1 else n for n in raw.shape[1:3]]
    parts = []
    for k in range(0, len(raw), 16):
        part = to_unit(raw[k : k + 16]).transpose(0, 1)
        parts.append(F.interpolate(part, size=size, mode="bicubic", antialias=True).clamp(-1, 1).transpose(0, 1))
    return torch.cat(parts, dim=1)
