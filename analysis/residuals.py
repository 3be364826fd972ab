"""How much of the bias is the residual's? ``python analysis/residuals.py`` (a control for Figs. 4 and 5).

The gradient at the decoder's input is the decoder's adjoint applied to the loss's gradient by the frames: the residual.
What truncation cuts of it depends on what the residual is like. Here the same crops are measured with

- *film*: latents of the encoder against the film itself. The residual is what this decoder cannot draw, nearly all of
  it nothing that training could remove;
- *blurred, film*: latents of the blurred film against the film: a restoration, with that floor in it;
- *blurred, own* and *noisy, own*: latents of the blurred film, and latents with noise of 0.3 standard deviations,
  against what the decoder draws of the film. No floor: all of the residual can be drawn;
- *random*: a normal random adjoint of the frames, of which no loss decides anything.

A backbone that is trained through a decoder of 33 dB sees residuals like the *own* ones: it is far from the target, and
the floor is a small share of its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.bias.residuals_figure import figure
from analysis.gradient_bias import errors_of
from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.settings import OnClips
from chopgrad import CausalDecoder
from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.command_line import run_main
from suite.losses import loss_by_name
from suite.pairwise import pairwise_gradients
from suite.printing import print_claims
from suite.records import Record
from suite.tables import with_interval
from suite.vaes import load_vae
from suite.verdicts import above

KINDS = ("film", "blurred, film", "blurred, own", "noisy, own", "random")
BLUR = 2.0
"""Standard deviation in pixels."""
NOISE = 0.3
"""In standard deviations of the latents."""
HIGH_COSINE = 0.95
"""What a high cosine is taken to mean at D = 1; the paper gives no number."""
MEASURES = ("relative_error", "cosine", "best_scaled_error")


@dataclass
class Config(OnClips):
    """Settings of the control."""

    full: bool = False
    """Longer and larger crops, more of them, and LPIPS beside MSE."""
    seed: int = 0

    @property
    def crops(self) -> Crops:
        if self.full:
            return Crops(self.clips, count=3, frames=49, size=(64, 64), seed=self.seed)
        return Crops(self.clips, count=2, frames=17, size=(32, 32), seed=self.seed)

    @property
    def losses(self) -> tuple[str, ...]:
        return ("mse", "lpips") if self.full else ("mse",)


def blurred(video: Tensor) -> Tensor:
    """[1, 3, frames, H, W] through a Gaussian, frame by frame, with its edges repeated."""
    reach = math.ceil(3 * BLUR)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=video.dtype) / BLUR) ** 2)
    weights = (weights / weights.sum()).to(video.device)
    y = video[0].transpose(0, 1).flatten(0, 1)[:, None]
    for kernel, pad in (((1, 1, -1, 1), (0, 0, reach, reach)), ((1, 1, 1, -1), (reach, reach, 0, 0))):
        y = F.conv2d(F.pad(y, pad, mode="replicate"), weights.view(kernel))
    return y.view(video.shape[2], 3, *video.shape[3:]).transpose(0, 1)[None]


def product(frames: Tensor, adjoint: Tensor) -> Tensor:
    """A loss whose gradient by the frames is the adjoint, up to a factor."""
    return (frames * adjoint).mean()


def measurement(vae: Any, names: tuple[str, ...], seed: int) -> Callable[..., dict[str, Any]]:
    """What ``measure_crops`` asks for each crop."""
    device = next(vae.parameters()).device
    losses = {name: loss_by_name(name, device) for name in names}

    def one(decoder: CausalDecoder, latents: Tensor, video: Tensor) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda like: torch.randn(like.shape, generator=generator).to(like)  # noqa: E731
        with torch.no_grad():
            own = decoder.decode(latents)
            of_blurred = vae.encode(blurred(video)).latent_dist.mode()
        noisy = latents + NOISE * latents.std() * draw(latents)
        cases = {
            "film": (latents, video),
            "blurred, film": (of_blurred, video),
            "blurred, own": (of_blurred, own),
            "noisy, own": (noisy, own),
            "random": (latents, draw(video)),
        }
        floor = (own - video).square().mean().item()
        found: dict[str, Any] = {}
        for kind, (z, target) in cases.items():
            fns = {"adjoint": product} if kind == "random" else losses
            pairs = pairwise_gradients(decoder, z, target, list(fns.values()))
            by_distance = {
                name: [errors_of(p, d, 1) for d in range(len(p))] for name, p in zip(fns, pairs, strict=True)
            }
            found[kind] = {"errors": by_distance}
            if kind != "random":
                with torch.no_grad():
                    residual = (decoder.decode(z) - target).square().mean().item()
                share = min(1.0, floor / residual) if target is video else 0.0
                found[kind] |= {"psnr_db": 10 * math.log10(4 / residual), "floor_share": share}
        return {"residuals": found}

    return one


def measure(config: Config) -> list[Record]:
    """One record for each decoder."""
    records = []
    for source in config.vaes:
        name, model = short_name(source), load_vae(source, config.device, subfolder=config.subfolder)
        path = config.folder / f"residuals-{name}.json"
        settings = {"full": config.full, "losses": list(config.losses), "blur": BLUR, "noise": NOISE}
        one = measurement(model, config.losses, config.seed)
        record = measure_crops(path, (source, model), config.crops, one, settings)
        summary = summarise(record.metrics["samples"])
        records.append(conclude(record, "summary", summary, claims(name, summary)))
    return records


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over clips with intervals: of each residual how far it is from its target, and by loss and distance the
    measures.
    """
    clips = [s["clip"] for s in samples]
    found: dict[str, Any] = {}
    for kind in KINDS:
        of_kind = [s["residuals"][kind] for s in samples]
        found[kind] = {
            name: list(mean_interval([x[name] for x in of_kind], clips))
            for name in ("psnr_db", "floor_share")
            if name in of_kind[0]
        }
        found[kind]["errors"] = {
            loss: [
                {m: list(mean_interval([x["errors"][loss][d][m] for x in of_kind], clips)) for m in MEASURES}
                for d in range(len(of_kind[0]["errors"][loss]))
            ]
            for loss in of_kind[0]["errors"]
        }
    return found


def claims(name: str, summary: dict[str, Any]) -> list[Claim]:
    """The cosine at D = 1 for each residual, and what the residual decides."""
    found = []
    for kind, of_kind in summary.items():
        for loss, rows in of_kind["errors"].items():
            if len(rows) < 3:  # D = 1 truncates nothing
                continue
            told = ", ".join(f"D={d} {with_interval(rows[d]['relative_error'], 2)}" for d in (0, 1, 2))
            from_target = ""
            if "psnr_db" in of_kind:
                share = 100 * of_kind["floor_share"][0]
                from_target = f"{of_kind['psnr_db'][0]:.1f} dB from its target, the floor {share:.0f} % of that; "
            found.append(
                Claim(
                    f"At D = 1 the gradient of the latents keeps a cosine over {HIGH_COSINE} with the full one "
                    f"(residual {kind}, {loss}, {name}).",
                    "Sec. 3.3, Fig. 5",
                    above([rows[1]["cosine"]], HIGH_COSINE),
                    f"{from_target}cosine {with_interval(rows[1]['cosine'], 3)}; relative error {told}",
                )
            )
    film, own = (summary[kind]["errors"]["mse"] for kind in ("film", "noisy, own"))
    if len(film) > 2:
        ratios = [film[1]["relative_error"][0] / own[1]["relative_error"][k] for k in (0, 2, 1)]
        verdict: Verdict = above([ratios], 2.0)
        found.append(
            Claim(
                f"The residual decides the bias: at D = 1 the error against the film is over twice that against the "
                f"decoder's own frames (MSE, {name}).",
                "ours",
                verdict,
                f"relative error {film[1]['relative_error'][0]:.2f} against {own[1]['relative_error'][0]:.2f}",
            )
        )
    return found


def main(config: Config) -> None:
    records = measure(config)
    figure(records, config.folder / "residuals.png")
    print_claims(records)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
