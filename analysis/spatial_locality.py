"""How local in space is the gradient? ``python analysis/spatial_locality.py`` (Fig. 7 of arXiv 2603.17812).

The paper also truncates in space: it differentiates chunks of the picture on their own. That loses whatever part of the
gradient of an output pixel reaches latents outside its chunk. Here a loss is taken on a small patch of the last frame
group (random adjoints on 8x8 pixels over one latent cell), and the squared gradient of all latents is added up by
spatial distance from that cell (Chebyshev, in latent cells, so that distance h is a chunk with a halo of h cells).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from analysis.locality.influence import decode_with_leaves
from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.receptive_field import untrained
from analysis.settings import OnClips
from chopgrad import CausalDecoder
from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.command_line import run_main
from suite.printing import print_claims
from suite.records import Record
from suite.tables import with_interval
from suite.vaes import load_vae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HALO = 4  # latent cells: 32 pixels


@dataclass
class Config(OnClips):
    """Settings of the measurement of spatial locality."""

    full: bool = False
    """More probes."""
    size: tuple[int, int] = (128, 128)
    """Height and width of a crop in pixels; a VAE of 16 pixels a latent (Wan 2.2) needs 256 for as many latents."""

    @property
    def crops(self) -> Crops:
        return Crops(self.clips, count=2, frames=9, size=self.size)

    @property
    def probes(self) -> int:
        return 4 if self.full else 2


def energy_by_distance(decoder: CausalDecoder, latents: Tensor, probes: int, seed: int = 0) -> list[float]:
    """Share of |dL/dz|^2 at spatial distance 0, 1, 2, ... latent cells from a patch of the last group's frames.

    The patch is the image of the central latent cell; L = <u, patch> with u of random signs, a new one for each probe,
    so the mean over probes estimates the squared Frobenius norm of the patch's Jacobian.

    Args:
        latents: [1, channels, T, h, w].

    Cost: one decode with its graph in memory and ``probes`` backward passes.
    """
    if probes < 1:
        raise ValueError(f"At least one probe is needed, got {probes}.")
    zs, frames = decode_with_leaves(decoder, latents)
    x = frames[-1]
    height, width = latents.shape[-2:]
    row, column, factor = height // 2, width // 2, x.shape[-1] // width
    patch = (slice(row * factor, (row + 1) * factor), slice(column * factor, (column + 1) * factor))
    generator = torch.Generator().manual_seed(seed)
    energy = torch.zeros(height, width, dtype=torch.float64)
    for _ in range(probes):
        adjoint = torch.zeros_like(x)
        part = adjoint[..., patch[0], patch[1]]
        part.copy_(torch.randint(0, 2, part.shape, generator=generator).to(x) * 2 - 1)
        for g in torch.autograd.grad(x, zs, adjoint, retain_graph=True, allow_unused=True):
            if g is not None:
                energy += g.double().square().sum((0, 1, 2)).cpu()
    far = torch.maximum((torch.arange(height) - row).abs()[:, None], (torch.arange(width) - column).abs()[None, :])
    shares = [energy[far == d].sum().item() for d in range(int(far.max()) + 1)]
    return [s / sum(shares) for s in shares]


def within(shares: list[float], halo: int) -> float:
    """Share of the energy within a halo of so many cells."""
    return sum(shares[: halo + 1])


def even_share(size: tuple[int, int], halo: int) -> float:
    """The same if the energy were spread evenly over a grid of latent cells: what no locality looks like."""
    height, width = size
    rows = min(height, height // 2 + halo + 1) - max(0, height // 2 - halo)
    columns = min(width, width // 2 + halo + 1) - max(0, width // 2 - halo)
    return rows * columns / (height * width)


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    clips = [s["clip"] for s in samples]
    halos = range(len(samples[0]["energy_share"]))
    return {
        "within_halo": [list(mean_interval([within(s["energy_share"], h) for s in samples], clips)) for h in halos],
        "even_spread_within_halo": [even_share(tuple(samples[0]["latent_size"]), h) for h in halos],
    }


def claims(name: str, trained: dict[str, Any], young: dict[str, Any]) -> list[Claim]:
    row, before = (x["within_halo"][HALO] for x in (trained, young))
    even = trained["even_spread_within_halo"][HALO]
    verdict: Verdict = "holds" if row[1] >= 0.99 else "fails" if row[2] < 0.99 else "undecided"
    enough = next((h for h, r in enumerate(trained["within_halo"]) if r[1] >= 0.99), None)
    near = ", ".join(f"{r[0]:.3f}" for r in trained["within_halo"][:3])
    return [
        Claim(
            f"The gradient of a pixel is local in space: a halo of {HALO} latent cells holds 99 % of its energy "
            f"({name}, trained).",
            "Fig. 7",
            verdict,
            f"share within {HALO} cells {with_interval(row, 4)} (spread evenly {even:.2f}; random weights "
            f"{with_interval(before, 4)}); within 0, 1, 2 cells {near}; 99 % needs {enough} cells",
        )
    ]


def measure(config: Config) -> list[Record]:
    """One record for each decoder and for its untrained form."""
    out = config.folder

    def one(decoder: CausalDecoder, latents: Tensor, _: Tensor) -> dict[str, Any]:
        return {
            "latent_size": list(latents.shape[-2:]),
            "energy_share": energy_by_distance(decoder, latents, config.probes),
        }

    records = []
    for source in config.vaes:
        name, model = short_name(source), load_vae(source, config.device, subfolder=config.subfolder)
        found = []
        for label, vae in ((f"{name}-untrained", untrained(model)), (name, model)):
            path = out / f"spatial_locality-{label}.json"
            settings = {"full": config.full, "probes": config.probes}
            record = measure_crops(path, (label, vae), config.crops, one, settings)
            found.append((record, summarise(record.metrics["samples"])))
        (young, before), (trained, after) = found
        records.append(conclude(young, "curve", before, []))
        records.append(conclude(trained, "curve", after, claims(name, after, before)))
    return records


def figure(records: list[Record], path: Path) -> None:
    """Energy outside a halo against its width, and the share at each distance is what falls between two points."""
    fig, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for k, record in enumerate(records):
        rows = np.array(record.metrics["curve"]["within_halo"])[:-1]
        style = "--" if "untrained" in record.settings["vae"] else "-"
        outside, high, low = (np.maximum(1 - rows[:, c], 1e-9) for c in range(3))
        axis.plot(outside, style, color=f"C{k // 2}", marker="o", markersize=3.5, label=record.settings["vae"])
        axis.fill_between(range(len(outside)), low, high, color=f"C{k // 2}", alpha=0.15, linewidth=0)
    axis.plot(1 - np.array(records[0].metrics["curve"]["even_spread_within_halo"])[:-1], "k:", label="spread evenly")
    axis.set_yscale("log")
    axis.set_xlabel("spatial distance from the pixel's own cell (latent cells of 8 pixels)")
    axis.set_ylabel("share of $|\\partial L / \\partial z|^2$ farther away")
    axis.set_title("Spatial locality of the gradient of an 8x8 patch")
    axis.grid(alpha=0.3)
    axis.legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(config: Config) -> None:
    records = measure(config)
    figure(records, config.folder / "spatial_locality.png")
    print_claims(records)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
