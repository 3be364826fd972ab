"""Figure and table of truncation in space, from the records of ``analysis/spatial_truncation.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from analysis.space.claims import label
from suite.records import Record
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {
    "film mse": "film, MSE", "film lpips": "film, LPIPS", "own mse": "decoder's own, MSE",
    "own lpips": "decoder's own, LPIPS", "random": "random adjoint",
}  # fmt: skip
TITLES = {"truncated": "truncated in space", "tiled": "independent tiles"}


def table(records: Sequence[Record]) -> str:
    """Markdown: gradients truncated and tiled, and the tiled frames."""
    rows = []
    for record in records:
        curves = record.metrics["curves"]
        psnr = {(t["residual"], t["strips"], t["space"]): t["psnr_db"] for t in curves["tiles"]}
        for r in curves["gradients"]:
            # Random adjoints are taken where the film's are.
            frames = psnr["film" if r["residual"] == "random" else r["residual"], r["strips"], r["space"]]
            case = [record.settings["vae"], _name(label(r)), curves["latent_rows"] // r["strips"], r["space"]]
            measured = [r[who][what] for who in TITLES for what in ("relative_error", "cosine")]
            rows.append([*case, *map(with_interval, measured), with_interval(frames, 1)])
    header = ["decoder", "adjoint", "strip", "k", "truncated: error", "cosine", "tiles: error", "cosine"]
    return markdown_table([*header, "tiles: PSNR of frames (dB)"], rows)


def figure(records: Sequence[Record], path: Path) -> None:
    """A row a decoder: error of truncated gradients, that of tiles, the tiles' frames, and heights of a strip."""
    fig, axes = plt.subplots(
        len(records), 4, figsize=(17.5, 4.2 * len(records) + 0.8), layout="constrained", squeeze=False
    )
    for line, record in zip(axes, records, strict=True):
        curves, settings = record.metrics["curves"], record.settings
        rows, count, vae = curves["latent_rows"], settings["strips"][0], settings["vae"]
        first = [r for r in curves["gradients"] if r["strips"] == count]
        for axis, (who, title) in zip(line, TITLES.items(), strict=False):
            for k, name in enumerate(dict.fromkeys(label(r) for r in first)):
                mine = [(r["space"], r[who]["relative_error"]) for r in first if label(r) == name]
                _line(axis, mine, f"C{k}", "-", _name(name))
            axis.set_title(f"{vae}: {title}, strips of {rows // count}")
        _frames(line[2], curves, count)
        line[2].set_title(f"{vae}: frames (truncation leaves them)")
        for k, strips in enumerate(settings["strips"]):
            of_height = [r for r in curves["gradients"] if r["strips"] == strips and r["residual"] == "random"]
            for who, style in zip(TITLES, ("-", "--"), strict=True):
                points = [(r["space"], r[who]["relative_error"]) for r in of_height]
                _line(line[3], points, f"C{k + 5}", style, f"strips of {rows // strips}, {who}")
        line[3].set_title(f"{vae}: height of a strip, random adjoint")
        for axis in line:
            axis.set_xlabel("k: latent rows beyond the strip")
            axis.set_xticks(settings["spaces"])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, **({"loc": "center right"} if axis is line[2] else {}))
            axis.set_ylabel("PSNR (dB)" if axis is line[2] else "relative error of the gradient")
        errors = [line[0], line[1], line[3]]
        for axis in errors:
            axis.set_yscale("log")
        ends = [axis.get_ylim() for axis in errors]
        for axis in errors:
            axis.set_ylim(min(e[0] for e in ends), max(e[1] for e in ends))
    s = records[0].settings
    fig.suptitle(
        f"Gradient at the decoder input, cut k latent rows beyond each strip: frames of {s['size'][0]}x{s['size'][1]}, "
        f"{len(s['clips'])} clip(s), mean and 95 % bootstrap interval"
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _frames(axis: Any, curves: Mapping[str, Any], strips: int) -> None:
    """PSNR of tiled frames to exact ones, and of exact ones to the targets."""
    told = {"film": ("encoder's latents", "the film"), "own": ("noisy latents", "the decoder's own")}
    for (color, style), (residual, (latents, target)) in zip((("C0", "-"), ("C3", "--")), told.items(), strict=True):
        tiles = [t for t in curves["tiles"] if (t["residual"], t["strips"]) == (residual, strips)]
        _line(axis, [(t["space"], t["psnr_db"]) for t in tiles], color, style, f"tiled to exact, {latents}")
        floor = curves["floor_psnr_db"][residual][0]
        axis.axhline(floor, color=color, linestyle=":", linewidth=1.5, label=f"exact to its target, {target}")


def _name(label: str) -> str:
    return NAMES.get(label, label)


def _line(axis: Any, points: Sequence[tuple[int, Sequence[float]]], color: str, style: str, name: str) -> None:
    x = [k for k, _ in points]
    mean, low, high = zip(*(triple for _, triple in points), strict=True)
    axis.plot(x, mean, style, color=color, marker="o", markersize=3.5, label=name)
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
