"""How well the embedded VAEs reconstruct: ``python weights/evaluate.py --vae wan2.1``.

PSNR of encode-decode on seeded crops, per clip, with clips seen in training and held-out clips apart; and the curve of
the training loss.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

import chopgrad
from suite.bootstrap import mean_interval
from suite.clips import HELD_OUT_CLIPS, TRAINING_CLIPS, find_clips, packaged_clip, seeded_crop, usable
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT, provenance, read_record, write_record
from suite.tables import markdown_table, with_interval
from suite.vaes import EMBEDDED, load_vae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class Config:
    """Settings of the evaluation."""

    vae: str = "wan2.1"
    """wan2.1 or cogvideox (the embedded decoders), a folder written by save_pretrained, or a hub id."""
    subfolder: str | None = None
    """Folder of the VAE inside a pipeline, usually 'vae'."""
    clips: Path | None = None
    """Folder of further held-out videos."""
    crops: int = 8
    """Seeded crops (position and first frame) per clip and size."""
    frames: int = 17
    sizes: tuple[int, ...] = (64, 128)
    """Height and width of a crop in pixels; a crop covers two thirds of the shorter side, or more."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0
    out: Path | None = None
    """Result file. None: results/reconstruction/<vae>.json."""


@torch.no_grad()
def evaluate(config: Config) -> Path:
    vae = load_vae(config.vae, config.device, subfolder=config.subfolder)
    decoder = chopgrad.decoder_for(vae)
    trained = [packaged_clip(name) for name in TRAINING_CLIPS]
    held_out = [packaged_clip(name) for name in HELD_OUT_CLIPS] + (find_clips(config.clips) if config.clips else [])
    clips, left_out = usable([*trained, *held_out], config.frames, config.crops, config.seed)
    rows: list[dict[str, Any]] = []
    for path in track(clips, description="reconstruction"):
        for size in config.sizes:
            values = []
            for k in range(config.crops):
                crop, _ = seeded_crop(path, k, config.frames, (size, size), config.seed)
                crop = crop.to(config.device)
                error = decoder.decode(vae.encode(crop).latent_dist.mode()) - crop
                values.append(10 * math.log10(4 / error.square().mean().item()))
            split = "trained" if path in trained else "held out"
            rows.append({"clip": path.name, "split": split, "size": size, "psnr_db": list(mean_interval(values))})
            rows[-1]["psnr_db_per_crop"] = values
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "clips")}
    settings |= {"clips": [path.name for path in clips], "clips_left_out": left_out, "sizes": list(config.sizes)}
    settings["vae"] = Path(config.vae).name if Path(config.vae).is_absolute() else config.vae
    path = config.out or ROOT / "results" / "reconstruction" / f"{Path(config.vae).name}.json"
    return write_record(path, settings, {"clips": rows}, provenance(config.device))


def table(rows: list[dict[str, Any]], sizes: tuple[int, ...]) -> str:
    """Mean PSNR and its bootstrap interval per clip and size."""
    by_clip: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        by_clip.setdefault((row["clip"], row["split"]), []).append(with_interval(row["psnr_db"], digits=1))
    header = ["clip", "seen in training", *(f"PSNR at {s}x{s} (dB)" for s in sizes)]
    return markdown_table(header, [[clip, "yes" if s == "trained" else "no", *v] for (clip, s), v in by_clip.items()])


def training_curve(folder: Path) -> None:
    """PSNR of the training samples against hours, over all rounds of training; written beside the model."""
    record = json.loads((folder / "training.json").read_text())
    rounds: list[dict[str, Any]] = []
    while record:
        rounds.insert(0, record)
        record = record.get("earlier")
    fig, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    hours = 0.0
    for k, one in enumerate(rounds):
        rows, images = one["log"]["rows"], one["settings"]["image_steps"]
        for color, phase, part in (
            ("C0", "single frames", [r for r in rows if r[0] <= images]),
            ("C1", "clips", [r for r in rows if r[0] > images]),
        ):
            if part:
                x, y = [hours + r[3] / 3600 for r in part], [r[1] for r in part]
                axis.plot(x, y, color=color, linewidth=1, label=phase if k == 0 else None)
        hours += one["train_seconds"] / 3600
    axis.set(xlabel="hours (one CPU thread)", ylabel="PSNR of training samples (dB)", title=folder.name)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    fig.savefig(folder / "training.png", dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    path = evaluate(config)
    record = read_record(path)
    text = table(record.metrics["clips"], config.sizes)
    for sentence in record.settings["clips_left_out"].values():
        text += f"\n\nLeft out: {sentence}"
    path.with_suffix(".md").write_text(f"# Reconstruction, {path.stem}\n\n{text}\n")
    if config.vae in EMBEDDED:
        training_curve(EMBEDDED[config.vae])
    print(text)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
