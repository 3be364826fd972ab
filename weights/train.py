"""Train the embedded decoders: ``python weights/train.py --model wan2.1``.

Single frames first (T = 1 is several times cheaper and teaches the spatial path), then clips. The loss is taken on the
unclamped output, because the clamp has no gradient where the young decoder saturates. The run resumes from its last
checkpoint after an interruption, or where its minutes were over (``--minutes``); a finished run writes the model with
``save_pretrained`` and a record of how it was made.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import chopgrad
from suite.command_line import run_main
from suite.progress import Bar
from suite.records import provenance
from weights import checkpoint
from weights.budget import Budget
from weights.diet import Diet
from weights.optimizers import optimizers
from weights.settings import UNDECIDED, Config, clip_steps_to_fill, learning_rate
from weights.single_frames import single_frames_as_images
from weights.widen import widened

HERE = Path(__file__).parent


def build(model: str, latent_channels: int) -> Any:
    """The untrained narrow model: temporal factor 4 and spatial factor 8, as the full-size ones.

    It needs more than their 16 latent channels, because so narrow a network cannot pack a picture as tightly.
    """
    if model == "wan2.1":
        return AutoencoderKLWan(base_dim=16, z_dim=latent_channels, dim_mult=[1, 2, 4, 5], num_res_blocks=1)
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 56), latent_channels=latent_channels, layers_per_block=1, norm_num_groups=8
    )


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


def compute_the_same_again() -> None:
    """On CUDA: a step from the same state gives the same weights, as it does on a CPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train(config: Config) -> Path | None:
    """Train, or go on with, one model.

    Returns:
        The folder of the finished model; None where the minutes were over before.

    Raises:
        ValueError: settings out of range, or a checkpoint of another run.
        SystemExit: told by a signal to end, with a checkpoint written.
    """
    budget = Budget(config.minutes)
    config.check()
    if config.threads:
        torch.set_num_threads(config.threads)
    run = config.run or Path("runs") / config.model
    out = config.out or HERE / f"tiny-{config.model}"
    run.mkdir(parents=True, exist_ok=True)
    file = run / "checkpoint.pt"
    saved = checkpoint.read(file, config) if file.exists() else None
    if config.fill_minutes:
        config = replace(config, clip_steps=saved["settings"]["clip_steps"] if saved else UNDECIDED)
    device = torch.device(config.device)
    if device.type == "cuda":
        compute_the_same_again()
    torch.manual_seed(config.seed)
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
    step, seconds, log, running = 0, 0.0, [], []
    if saved:
        vae.load_state_dict(saved["model"])
        for optimizer, state in zip(steppers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if average:
            average.load_state_dict(saved["average"])
        step, seconds, log, running = (saved[name] for name in ("step", "seconds", "log", "running"))
        print(f"Resumed {config.model} at step {step}.")
    diet = Diet(config)

    def save() -> None:
        state = {
            "model": vae.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in steppers],
            "average": average and average.state_dict(),
            "step": step,
            "seconds": seconds,
            "log": log,
            "running": [float(mse) for mse in running],
        }
        began = time.monotonic()
        checkpoint.write(file, config, state)
        budget.took(saving=time.monotonic() - began)

    def snapshot() -> None:
        if step in config.snapshot_steps:
            vae.save_pretrained(run / "snapshots" / f"step-{step:06d}")

    shown = None if config.clip_steps == UNDECIDED else config.steps
    with budget, Bar(config.model, shown, step) as bar, single_frames_as_images():
        saved_at = began = time.monotonic()
        samples, begins = diet.batches(step), True
        snapshot()
        while step < config.steps and budget.allows_step():
            if config.clip_steps == UNDECIDED and (chosen := clip_steps_to_fill(config, step, budget)):
                config = diet.config = replace(config, clip_steps=chosen)
            images = step < config.image_steps
            lr, _ = learning_rate(config, step)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            clip = next(samples)
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
            running.append(mse)  # as a number only where it is needed: a GPU would have to be waited for
            step += 1
            bar.advance()
            snapshot()
            now = time.monotonic()
            if not begins:  # such a step waits for processes to start, and for kernels
                budget.took(step=now - began)
            seconds, began, begins = seconds + now - began, now, False
            if step % 50 == 0 or step == config.steps:
                value = psnr(sum(float(mse) for mse in running) / len(running))
                running.clear()
                log.append([step, value, lr, seconds])
                bar.note(f"{'frames' if images else 'clips'} {value:.2f} dB")
                with open(run / "log.csv", "w", newline="") as table:
                    csv.writer(table).writerows([["step", "psnr_db", "lr", "seconds"], *log])
            if now - saved_at > config.checkpoint_every_seconds or step in (config.image_steps, config.steps):
                save()
                saved_at = now
        if step < config.steps:
            save()
        if step < config.steps or not budget.allows_export():
            of = "" if config.clip_steps == UNDECIDED else f" of {config.steps}"
            pace = f" at {budget.pace:.2g} s a step" if budget.pace else ""
            print(f"Stopped {config.model} after step {step}{of}{pace}; the same command goes on from '{file}'.")
            if budget.signal:
                raise SystemExit(128 + budget.signal)
            return None
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
    record = {
        "settings": config.recorded(),
        "train_seconds": round(seconds),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "torch": torch.__version__,
        "provenance": provenance(device),
        "earlier": earlier,
        "log": {"columns": ["step", "psnr_db", "lr", "seconds"], "rows": log},
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main(config: Config) -> None:
    # Processes that prepare samples begin with these imports, instead of importing each for itself.
    torch.multiprocessing.set_forkserver_preload(["weights.train"])
    train(config)


if __name__ == "__main__":
    run_main(main, Config, __doc__, {ModuleNotFoundError: ""})
