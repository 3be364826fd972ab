"""The loop that the theory's experiments share: crops of real clips through a trained VAE, one record, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import chopgrad
from chopgrad import CausalDecoder
from suite.claims import Claim
from suite.clips import HELD_OUT_CLIPS, find_clips, packaged_clip, seeded_crop, usable
from suite.fingerprint import inputs_sha256
from suite.progress import track
from suite.records import ROOT, Record, provenance, read_record, write_record
from suite.sizes import check_size, latent_frames
from suite.vaes import EMBEDDED, load_vae


@dataclass(frozen=True)
class Crops:
    """Which crops of which clips: the held-out packaged clip and, if given, every video of a folder.

    Args:
        folder: more clips; those that are too short or cannot be read are left out and named in the record.
        count: seeded crops (position and first frame) of each clip.
        frames, size: of a crop, in frames and pixels.
    """

    folder: Path | None
    count: int
    frames: int
    size: tuple[int, int]
    seed: int = 0

    def clips(self) -> tuple[list[Path], dict[str, str]]:
        """(the clips of which all crops can be read, name -> what is wrong with each of the others).

        Cost: every crop is decoded once, so that no clip fails while it is measured.

        Raises:
            ValueError: none is left, or the settings leave nothing to measure.
        """
        if self.count < 1 or self.frames < 1 or min(self.size) < 1:
            raise ValueError(
                f"At least one crop, frame and pixel is needed, got {self.count} crops of {self.frames} frames at "
                f"{self.size}."
            )
        found = [packaged_clip(name) for name in HELD_OUT_CLIPS] + (find_clips(self.folder) if self.folder else [])
        return usable(found, self.frames, self.count, self.seed)

    def video(self, clip: Path, k: int) -> tuple[Tensor, int]:
        """Crop k of a clip as [1, 3, frames, H, W] in [-1, 1], and its first frame."""
        return seeded_crop(clip, k, self.frames, self.size, self.seed)


Measure = Callable[[CausalDecoder, Tensor, Tensor], Mapping[str, Any]]
"""(decoder, latents [1, channels, T, h, w], video [1, 3, frames, H, W]) -> what one crop yields."""


def measure_crops(
    path: Path,
    vae: str | tuple[str, Any],
    crops: Crops,
    measure: Measure,
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Record:
    """Measure every crop and write a record of the samples, rewritten after each; what is there already is kept.

    Args:
        path: the record. An earlier one is gone on with if settings, weights, videos, code and machine are the same.
        vae: a source for ``suite.vaes.load_vae``, or (name, model).
        settings: the experiment's own settings, for the record.

    Returns:
        The record; its metrics are ``samples`` alone, each with ``clip``, ``crop``, ``first_frame``, ``psnr_db``.
    """
    clips, left_out = crops.clips()
    name, model = vae if isinstance(vae, tuple) else (vae, load_vae(vae, dtype=dtype))
    decoder = chopgrad.decoder_for(model)
    latent_frames(decoder, crops.frames)
    check_size(model, decoder, crops.size)
    settings = {
        "vae": Path(name).name if Path(name).is_absolute() else name,
        "clips": [c.name for c in clips],
        "clips_left_out": left_out,
        "crops": crops.count,
        "frames": crops.frames,
        "size": list(crops.size),
        "seed": crops.seed,
        **settings,
        "inputs_sha256": inputs_sha256(model, clips),
    }
    device = next(model.parameters()).device
    made_by = provenance(device)
    # Uncommitted code is not named by its commit, so nothing measured with it is trusted to be the same.
    samples = {} if made_by["dirty"] else finished(path, settings, made_by)
    todo = [(clip, k) for clip in clips for k in range(crops.count) if (clip.name, k) not in samples]
    for clip, k in _progress(todo, path.stem):
        video, start = crops.video(clip, k)
        video = video.to(device, dtype)
        latents, psnr_db = encoded(model, decoder, video)
        samples[clip.name, k] = {
            "clip": clip.name,
            "crop": k,
            "first_frame": start,
            "psnr_db": psnr_db,
            **measure(decoder, latents, video),
        }
        write_record(path, settings, {"samples": list(samples.values())}, made_by)
    write_record(path, settings, {"samples": list(samples.values())}, made_by)
    return read_record(path)


def finished(path: Path, settings: dict[str, Any], made_by: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Samples of an interrupted run with the same settings, code and device."""
    try:
        old = read_record(path)
    except ValueError:
        return {}
    same = all(old.provenance.get(key) == made_by[key] for key in ("commit", "dirty", "torch", "device"))
    if old.settings != settings or not same or "summary" in old.metrics:
        return {}
    return {(s["clip"], s["crop"]): s for s in old.metrics["samples"]}


def encoded(vae: Any, decoder: CausalDecoder, video: Tensor) -> tuple[Tensor, float]:
    """(latents of the VAE's own encoder, PSNR of what they decode to in dB)."""
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        mse = (decoder.decode(latents) - video).square().mean().item()
    return latents, 10 * math.log10(4 / mse)


def conclude(record: Record, name: str, summary: Mapping[str, Any], claims: Iterable[Claim]) -> Record:
    """The record of ``measure_crops`` written again, with what follows from its samples under ``name``, and claims."""
    metrics = {"samples": record.metrics["samples"], name: summary, "claims": [asdict(c) for c in claims]}
    return read_record(write_record(record.path, record.settings, metrics, record.provenance))


def left_out_together(samples: list[dict[str, Any]]) -> Callable[[dict[str, Any]], str | tuple[str, int]]:
    """Sample -> what is left out with it when constants are tested on samples that they were not fitted to.

    That is its clip, whose crops are too alike to test each other, or its crop where all are of one clip.
    """
    if len({s["clip"] for s in samples}) > 1:
        return lambda sample: sample["clip"]
    return lambda sample: (sample["clip"], sample["crop"])


def output_folder(out: Path | None, full: bool) -> Path:
    """Where records go: ``results/theory`` for a full run, else ``runs/theory``, which is not committed."""
    return out or ROOT / ("results" if full else "runs") / "theory"


def short_name(vae: str) -> str:
    """A name for files: of an embedded VAE, a folder or a hub id."""
    return vae if vae in EMBEDDED else Path(vae).name


def _progress(todo: list, description: str) -> Iterable:
    return track(todo, description=description) if todo else []
