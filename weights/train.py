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
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import chopgrad
from suite.clips import TRAINING_CLIPS, packaged_clip, read_frames, to_unit
from suite.command_line import run_main
from suite.motion import moving_clip, photographs
from suite.progress import Bar
from weights.optimizers import optimizers
from weights.widen import widened

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
    error: Literal["squared", "log"] = "squared"
    """Mean squared error, or its logarithm per sample (PSNR), in which grass and gravel weigh no more than a face."""
    l1_weight: float = 0.2
    """Weight of the mean absolute error beside the mean squared error."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon orthogonalises the steps of convolution kernels; the rest stays with AdamW. One learning rate for both."""
    decay_share: float = 1.0
    """Last share of a phase in which the learning rate falls (half a cosine); it is constant before."""
    ema_decay: float = 0.0
    """Average the weights over about 1 / (1 - decay) steps, and write that average (0: the last weights)."""
    latent_channels: int = 32
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
    """Finished model to go on from instead of random weights; it may have fewer latent channels. Its own record is kept
    in the new one."""
    snapshot_steps: tuple[int, ...] = ()
    """Optimiser steps (0: before training) at which the model is kept, in float32, in <run>/snapshots/step-<step>."""
    run: Path | None = None
    """Folder of checkpoints and the loss log. None: runs/<model>."""
    out: Path | None = None
    """Folder the finished model is written to. None: weights/tiny-<model>."""


def build(model: str, latent_channels: int) -> Any:
    """The untrained narrow model: temporal factor 4 and spatial factor 8, as the full-size ones.

    It needs more than their 16 latent channels, because so narrow a network cannot pack a picture as tightly.
    """
    if model == "wan2.1":
        return AutoencoderKLWan(base_dim=16, z_dim=latent_channels, dim_mult=[1, 2, 4, 5], num_res_blocks=1)
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 56), latent_channels=latent_channels, layers_per_block=1, norm_num_groups=8
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


def reconstruction_loss(vae: Any, clip: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(training loss, mean squared error) of the unclamped reconstruction."""
    posterior = vae.encode(clip).latent_dist
    decoded = chopgrad.decoder_for(vae, clamp=False, check=False).decode(posterior.sample())
    error = decoded - clip
    mse = error.square().mean((1, 2, 3, 4))
    main = mse.log().mean() if config.error == "log" else mse.mean()
    # L1 keeps the gradient alive on the many nearly right pixels; KL only keeps the latents from drifting apart.
    return main + config.l1_weight * error.abs().mean() + config.kl_weight * posterior.kl().mean(), mse.mean().detach()


def latents_of(vae: Any) -> int:
    """Number of latent channels."""
    return vae.config["z_dim" if "z_dim" in vae.config else "latent_channels"]


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for values in [-1, 1]."""
    return 10 * math.log10(4 / mse)


def learning_rate(config: Config, step: int) -> tuple[float, float]:
    """(learning rate of a step, share of its phase that is done): 100 steps of warm-up, constant, then half a cosine.

    It does not depend on the length of the phase before it falls: until then a run may be resumed with more steps.
    """
    images = step < config.image_steps
    steps, within = (config.image_steps, step) if images else (config.clip_steps, step - config.image_steps)
    done = within / steps
    decayed = max(0.0, 1 - (1 - done) / config.decay_share)
    fall = 0.02 + 0.98 * (1 + math.cos(math.pi * decayed)) / 2
    return (config.image_lr if images else config.clip_lr) * min(1.0, (within + 1) / 100) * fall, done


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
    vae = build(config.model, config.latent_channels).to(device)
    earlier = None
    if config.start:
        begun = type(vae).from_pretrained(config.start)
        vae.load_state_dict(widened(begun.state_dict(), vae.state_dict(), (latents_of(begun), latents_of(vae))))
        earlier = json.loads((config.start / "training.json").read_text())
    if config.mixed_precision:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
    steppers = optimizers(vae, config.optimizer, config.image_lr)
    step, seconds, log = 0, 0.0, []
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(saved["model"])
        for optimizer, state in zip(steppers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if average:
            average.load_state_dict(saved["average"])
        step, seconds, log = saved["step"], saved["seconds"], saved["log"]
        print(f"Resumed {config.model} at step {step}.")
    diet = Diet(config)
    total = config.image_steps + config.clip_steps

    def save() -> None:
        state = {
            "model": vae.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in steppers],
            "average": average and average.state_dict(),
            "step": step,
            "seconds": seconds,
            "log": log,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    def snapshot() -> None:
        if step in config.snapshot_steps:
            vae.save_pretrained(run / "snapshots" / f"step-{step:06d}")

    with Bar(config.model, total, step) as bar, single_frames_as_images():
        saved_at = began = time.monotonic()
        running: list[float] = []
        snapshot()
        while step < total:
            images = step < config.image_steps
            lr, done = learning_rate(config, step)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            if images:
                clip = diet.batch(step, config.image_batch, 1)
            else:
                long = done >= 0.8
                clip = diet.batch(step, 1 if long else config.clip_batch, 17 if long else config.clip_frames)
            torch.manual_seed(config.seed * 1_000_003 + step)  # the posterior's noise
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision):
                loss, mse = reconstruction_loss(vae, clip.to(device), config)
            vae.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for optimizer in steppers:
                optimizer.step()
            if average:
                average.update_parameters(vae)
            running.append(mse.item())
            step += 1
            bar.advance()
            snapshot()
            now = time.monotonic()
            seconds, began = seconds + now - began, now
            if step % 50 == 0 or step == total:
                value = psnr(sum(running) / len(running))
                running.clear()
                log.append([step, value, lr, seconds])
                bar.note(f"{'frames' if images else 'clips'} {value:.2f} dB")
                with open(run / "log.csv", "w", newline="") as file:
                    csv.writer(file).writerows([["step", "psnr_db", "lr", "seconds"], *log])
            if now - saved_at > config.checkpoint_every_seconds or step in (config.image_steps, total):
                save()
                saved_at = now
    export(average.module if average else vae, diet, config, out, seconds, log, earlier)
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
    run_main(train, Config, __doc__)
