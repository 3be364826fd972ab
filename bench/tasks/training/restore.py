"""A finished run applied to a video file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bench.tasks.pictures import write_video
from bench.tasks.training.train import Training
from bench.tasks.training.weights import load_weights, settings_of
from suite.clips import read_frames, to_unit
from suite.progress import Bar
from suite.sizes import latent_frames


def restore_video(run: Path, video: Path, out: Path, frames: int | None = None, cpu: bool = False) -> None:
    """Write the restored video.

    Raises:
        ValueError: no finished run, a video that cannot be read, or one too small for the model.
    """
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"--out must name an .mp4 file, got '{out.name}'.")
    training = Training(dataclasses.replace(settings_of(run), cpu=cpu, start=None))
    load_weights(run, training.accelerator.unwrap_model(training.model), training.vae)
    pixels = to_unit(read_frames(video, frames))
    length = next(n for n in range(pixels.shape[1], 0, -1) if _decodes_to(training, n))
    factor = training.spatial_factor
    height, width = (n - n % factor for n in pixels.shape[2:])
    if min(height, width) == 0:
        raise ValueError(f"'{video.name}' is {pixels.shape[2]}x{pixels.shape[3]} pixels: pass at least {factor}.")
    pixels = pixels[:, :length, :height, :width]
    weights, decoder = next(iter(training.vae.parameters())), training.decoder
    groups = decoder.frame_groups(latent_frames(decoder, length))
    with torch.no_grad(), Bar(f"restoring {video.name}", len(groups)) as bar:
        bar.say(f"encoding {length} frames of {height}x{width}")
        posterior = training.vae.encode(pixels[None].to(weights.device, weights.dtype)).latent_dist
        bar.say("restoring the latents")
        latents = training.restored_latents(decoder.normalize(posterior.mode()).float())
        bar.note("frame groups decoded")
        state, parts = decoder.initial_state(), []
        for group in groups:
            x, state = decoder.step(latents[:, :, group.latents], state)
            parts.append(x[0].float().cpu())
            bar.advance()
    write_video(out, torch.cat(parts, dim=1))
    print(f"Written: {out.name}, {length} frames of {height}x{width}")


def _decodes_to(training: Training, frames: int) -> bool:
    try:
        latent_frames(training.decoder, frames)
    except ValueError:
        return False
    return True
