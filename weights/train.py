"""Train the embedded decoders: ``python weights/train.py --model wan2.1``.

Single frames first (T = 1 is several times cheaper and teaches the spatial path), then clips. The loss is taken on the
unclamped output, because the clamp has no gradient where the young decoder saturates. The run resumes from its last
checkpoint after an interruption; a finished run writes the model with ``save_pretrained`` and a record of how it was
made.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

import chopgrad
from suite.clips import TRAINING_CLIPS, packaged_clip, read_frames, to_unit
from suite.motion import moving_clip, photographs

HERE = Path(__file__).parent


@dataclass
class Config:
    """Settings of a training run."""

    model: Literal["wan2.1", "cogvideox"]
    """Architecture: a narrow AutoencoderKLWan (2.1) or AutoencoderKLCogVideoX."""
    image_steps: int = 6000
    """Optimiser steps on single frames."""
    clip_steps: int = 1300
    """Optimiser steps on clips."""
    image_batch: int = 8
    clip_batch: int = 2
    clip_frames: int = 9
    """Frames of a training clip (one of 17 frames in the last fifth of the clip phase)."""
    size: int = 64
    """Height and width of the training crops in pixels."""
    image_lr: float = 1e-3
    clip_lr: float = 5e-4
    kl_weight: float = 1e-7
    real_share: float = 0.5
    """Share of training samples from real video; the rest is generated motion over photographs."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    mixed_precision: bool = False
    """Run convolutions in bfloat16 (autocast) and channels-last: 1.8 times faster where the processor has both."""
    threads: int = 0
    """CPU threads (0: PyTorch's default)."""
    checkpoint_every_seconds: float = 60.0
    start: Path | None = None
    """Finished model to go on from instead of random weights (its own record is kept in the new one)."""
    snapshot_steps: tuple[int, ...] = ()
    """Optimiser steps (0: before training) at which the model is kept, in float32, in <run>/snapshots/step-<step>."""
    run: Path | None = None
    """Folder of checkpoints and the loss log (default: runs/<model>)."""
    out: Path | None = None
    """Folder the finished model is written to (default: weights/tiny-<model>)."""


def build(model: str) -> Any:
    """The untrained narrow model: temporal factor 4 and spatial factor 8, as the full-size ones.

    Twice their 16 latent channels, because so narrow a network cannot pack a picture as tightly.
    """
    if model == "wan2.1":
        return AutoencoderKLWan(base_dim=16, z_dim=32, dim_mult=[1, 2, 4, 5], num_res_blocks=1)
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 56), latent_channels=32, layers_per_block=1, norm_num_groups=8
    )


class Diet:
    """Training samples: crops of real video and generated motion, seeded by step so that a resumed run is the same."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.videos = [to_unit(read_frames(packaged_clip(name))).half() for name in TRAINING_CLIPS]
        photographs()

    def batch(self, step: int, batch: int, frames: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return torch.stack([self._sample(generator, frames) for _ in range(batch)])

    def _sample(self, generator: torch.Generator, frames: int) -> Tensor:
        size = self.config.size
        if torch.rand((), generator=generator) >= self.config.real_share:
            objects = int(torch.randint(0, 3, (), generator=generator)) if frames > 1 else 0
            return moving_clip(generator, frames, size, size, objects)
        video = self.videos[torch.randint(len(self.videos), (), generator=generator)]
        stride = int(torch.randint(1, 3, (), generator=generator))
        span = (frames - 1) * stride + 1
        start = int(torch.randint(video.shape[1] - span + 1, (), generator=generator))
        # Log-uniform scale, from one video pixel per training pixel to the whole picture height.
        largest = min(video.shape[2:])
        crop = round(size * (largest / size) ** torch.rand((), generator=generator).item())
        top = int(torch.randint(video.shape[2] - crop + 1, (), generator=generator))
        left = int(torch.randint(video.shape[3] - crop + 1, (), generator=generator))
        clip = video[:, start : start + span : stride, top : top + crop, left : left + crop].float()
        if torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        clip = F.interpolate(clip.transpose(0, 1), size=(size, size), mode="bilinear", antialias=True)
        return clip.transpose(0, 1)


@contextlib.contextmanager
def single_frames_as_images() -> Iterator[None]:
    """Evaluate causal 3D convolutions of one uncached frame in 2D: the same result at a third of the work.

    In front of a first frame Wan pads with zeros (only the last temporal slice of the kernel sees the frame) and
    CogVideoX repeats the frame (the slices add up).
    """
    wan, cog = WanCausalConv3d.forward, CogVideoXCausalConv3d.forward

    def wan_forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.stride[0] > 1 or self.kernel_size[0] == 1:
            return wan(self, x, cache_x)
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[2:4])
        return out[:, :, None]

    def cog_forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.shape[2] > 1 or conv_cache is not None or self.time_kernel_size == 1:
            return cog(self, inputs, conv_cache)  # type: ignore
        conv = self.conv
        out = F.conv2d(
            inputs[:, :, 0], conv.weight.sum(2), conv.bias, conv.stride[1:], (self.height_pad, self.width_pad)
        )
        return out[:, :, None], inputs.repeat(1, 1, self.time_kernel_size - 1, 1, 1)

    WanCausalConv3d.forward, CogVideoXCausalConv3d.forward = wan_forward, cog_forward  # type: ignore
    try:
        yield
    finally:
        WanCausalConv3d.forward, CogVideoXCausalConv3d.forward = wan, cog  # type: ignore


def reconstruction_loss(vae: Any, clip: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """(training loss, mean squared error) of the unclamped reconstruction."""
    posterior = vae.encode(clip).latent_dist
    decoded = chopgrad.decoder_for(vae, clamp=False).decode(posterior.sample())
    error = decoded - clip
    mse = error.square().mean()
    # L1 keeps the gradient alive on the many nearly right pixels; KL only keeps the latents from drifting apart.
    return mse + 0.2 * error.abs().mean() + kl_weight * posterior.kl().mean(), mse.detach()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for values in [-1, 1]."""
    return 10 * math.log10(4 / mse)


def train(config: Config) -> Path:
    """Train, or go on with, one model; returns the folder of the finished model."""
    if config.clip_frames % 8 != 1:
        raise ValueError(f"clip_frames must be 1 more than a multiple of 8, got {config.clip_frames}.")
    if outside := [n for n in config.snapshot_steps if not 0 <= n <= config.image_steps + config.clip_steps]:
        raise ValueError(
            f"snapshot_steps must lie within the run's {config.image_steps + config.clip_steps} steps, got {outside}."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    run = config.run or Path("runs") / config.model
    out = config.out or HERE / f"tiny-{config.model}"
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    vae = build(config.model).to(device)
    earlier = None
    if config.start:
        vae.load_state_dict({k: v.float() for k, v in type(vae).from_pretrained(config.start).state_dict().items()})
        earlier = json.loads((config.start / "training.json").read_text())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.image_lr, betas=(0.9, 0.99), weight_decay=0.01)
    step, seconds, log = 0, 0.0, []
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, log = saved["step"], saved["seconds"], saved["log"]
        print(f"Resumed {config.model} at step {step}.")
    if config.mixed_precision:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    diet = Diet(config)
    total = config.image_steps + config.clip_steps

    def save() -> None:
        state = {
            "model": vae.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "log": log,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    def snapshot() -> None:
        if step in config.snapshot_steps:
            vae.save_pretrained(run / "snapshots" / f"step-{step:06d}")

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress, single_frames_as_images():
        bar = progress.add_task(config.model, total=total, completed=step)
        saved_at = began = time.monotonic()
        running: list[float] = []
        snapshot()
        while step < total:
            images = step < config.image_steps
            done = step / config.image_steps if images else (step - config.image_steps) / config.clip_steps
            warmup = min(1.0, (step + 1 if images else step + 1 - config.image_steps) / 100)
            lr = (
                (config.image_lr if images else config.clip_lr)
                * warmup
                * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            if images:
                clip = diet.batch(step, config.image_batch, 1)
            else:
                long = done >= 0.8
                clip = diet.batch(step, 1 if long else config.clip_batch, 17 if long else config.clip_frames)
            torch.manual_seed(config.seed * 1_000_003 + step)  # the posterior's noise
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision):
                loss, mse = reconstruction_loss(vae, clip.to(device), config.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            running.append(mse.item())
            step += 1
            snapshot()
            now = time.monotonic()
            seconds, began = seconds + now - began, now
            if step % 50 == 0 or step == total:
                value = psnr(sum(running) / len(running))
                running.clear()
                log.append([step, value, lr, seconds])
                phase = "frames" if images else "clips"
                progress.update(bar, completed=step, description=f"{config.model} {phase} {value:.2f} dB")
                with open(run / "log.csv", "w", newline="") as file:
                    csv.writer(file).writerows([["step", "psnr_db", "lr", "seconds"], *log])
            if now - saved_at > config.checkpoint_every_seconds or step in (config.image_steps, total):
                save()
                saved_at = now
    export(vae, diet, config, out, seconds, log, earlier)
    return out


@torch.no_grad()
def export(vae: Any, diet: Diet, config: Config, out: Path, seconds: float, log: list, earlier: dict | None) -> None:
    """Write the model in float16 with its latent statistics, and how it was trained."""
    device = torch.device(config.device)
    latents = [vae.encode(diet.batch(10_000_000 + i, 2, 17).to(device)).latent_dist.mode() for i in range(16)]
    z = torch.cat(latents)
    if config.model == "wan2.1":
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        vae.register_to_config(scaling_factor=1 / z.std().item())
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(out)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if k not in ("run", "out")}
    record = {
        "settings": settings,
        "train_seconds": round(seconds),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "torch": torch.__version__,
        "earlier": earlier,
        "log": {"columns": ["step", "psnr_db", "lr", "seconds"], "rows": log},
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    train(tyro.cli(Config))
