"""How wrong is a gradient truncated in space? ``python analysis/spatial_truncation.py`` (Fig. 7 of arXiv 2603.17812).

The paper computes gradients over spatial chunks of the video separately (Sec. 3.3). Here the adjoint of each strip of
the frames is swept back alone, and dropped wherever it is more than k latent rows beyond the strip
(``Chop(..., strips=n, space=k)``); frames stay what they are. Beside it stands what people do without such a sweep:
strips of latents decoded on their own, with k rows of overlap that are cut off, which changes the frames as well. Both
gradients are compared with the exact one, for strips of several heights. Of the tiles' error the part of each change is
told, too: that of the frames alone (exact decoder, adjoint of the tiled frames), and that of the decoder alone.

The bias depends on what the loss asks for, so each number is given for three adjoints:

- ``film``: target is the clip, latents are the encoder's. The residual is what a small decoder cannot draw.
- ``own``: target is what the decoder makes of the encoder's latents; the loss is taken at latents with noise of 0.3
  standard deviations, so that the decoder could draw all that is asked for.
- ``random``: independent normal numbers, which no loss has chosen.

Controls: with k as large as the picture the error is zero but for rounding, and the library's own sweep gives the
gradient that the definition gives (one graph, masked wherever a piece hands something on). What truncation in space
saves is counted in ``analysis/space/cost.py``: exact strips (``Exact(pieces=True, strips=n)``) are what it must beat.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import chopgrad
from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.settings import OnClips
from analysis.space.claims import claims, summarise
from analysis.space.cost import measure_cost
from analysis.space.cut import CutDecode, TiledDecode, errors, share_at_cuts
from analysis.space.figure import figure, table
from chopgrad import CausalDecoder, Chop
from suite.command_line import run_main
from suite.losses import loss_by_name
from suite.printing import print_claims
from suite.records import Record
from suite.vaes import load_vae

NOISE = 0.3  # standard deviations of the latents
PARITY = 1e-3  # float32: two orders of summation


@dataclass
class Config(OnClips):
    """Settings of the measurement of truncation in space."""

    full: bool = False
    """Larger crops, more strips and distances, LPIPS too."""
    size: tuple[int, int] | None = None
    """Height and width of a crop in pixels. None: 32x32, or 128x32 with --full."""
    seed: int = 0

    def crops(self, groups_of_eight: bool) -> Crops:
        # The fewest frames with a whole group: truncation in space has nothing to do with how many there are.
        size = self.size or ((128, 32) if self.full else (32, 32))
        return Crops(self.clips, 1, 9 if groups_of_eight else 5, size, self.seed)

    @property
    def losses(self) -> tuple[str, ...]:
        return ("mse", "lpips") if self.full else ("mse",)

    @property
    def strips(self) -> tuple[int, ...]:
        """Numbers of strips: the first with every loss and distance, the second with the first loss and three
        distances, and others with the random adjoint only."""
        return (2, 4, 8) if self.full else (2,)

    @property
    def spaces(self) -> tuple[int, ...]:
        return (0, 1, 2, 4) if self.full else (0, 1)


def measure(config: Config) -> list[Record]:
    """One record for each decoder."""
    losses = {name: loss_by_name(name, config.device) for name in config.losses}
    records = []
    for source in config.vaes:
        name, model = short_name(source), load_vae(source, config.device, subfolder=config.subfolder)

        def one(decoder: CausalDecoder, latents: Tensor, video: Tensor) -> dict[str, Any]:
            return _measure_one(decoder, latents, video, losses, config)

        settings = {
            "full": config.full, "losses": list(losses), "strips": list(config.strips), "spaces": list(config.spaces),
            "noise": NOISE,
        }  # fmt: skip
        path = config.folder / f"spatial_truncation-{name}.json"
        record = measure_crops(path, (source, model), config.crops("cog" in name.lower()), one, settings)
        summary = summarise(record.metrics["samples"])
        records.append(conclude(record, "curves", summary, claims(name, summary)))
    return records


def _measure_one(
    decoder: CausalDecoder,
    latents: Tensor,
    video: Tensor,
    losses: dict[str, Callable[..., Tensor]],
    config: Config,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        own = decoder.decode(latents)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    random = torch.randn(own.shape, generator=generator).to(own)
    result: dict[str, Any] = {"latent_rows": latents.shape[-2], "floor_psnr_db": {}, "gradients": [], "tiles": []}
    for residual, z, target in (("film", latents, video), ("own", latents + NOISE * latents.std() * noise, own)):
        decode = CutDecode(decoder, z)
        frames = decode.frames.detach()
        result["floor_psnr_db"][residual] = _psnr_db(frames, target)
        adjoints = {name: _adjoint(loss_fn, frames, target) for name, loss_fn in losses.items()}
        if residual == "film":
            adjoints["random"] = random
        exact = {name: decode.gradient(adjoint) for name, adjoint in adjoints.items()}
        if residual == "film":
            result["control"] = _control(decoder, z, decode, random, exact["random"], config)
        for rank, strips in enumerate(config.strips):
            few = [name for name in adjoints if name == "random" or (name == config.losses[0] and rank == 1)]
            asked = few if rank else list(adjoints)
            for space in (config.spaces[:3] if rank else config.spaces) if asked else ():
                tiled = TiledDecode(decoder, z, strips, space)
                made = tiled.frames.detach()
                case = {"residual": residual, "strips": strips, "space": space}
                change = (made - frames).norm() / frames.norm()
                result["tiles"].append(case | {"relative_error": change.item(), "psnr_db": _psnr_db(made, frames)})
                for name in asked:
                    cut = decode.gradient(adjoints[name], strips, space)
                    of_tiles = random if name == "random" else _adjoint(losses[name], made, target)
                    found = {
                        "truncated": errors(cut, exact[name])
                        | {"share_at_cuts": share_at_cuts(cut, exact[name], strips)},
                        "tiled": errors(tiled.gradient(of_tiles), exact[name]),
                    }
                    if rank == 0 and name == config.losses[0]:  # which of the two changes is it that errs
                        found |= {
                            "frames_alone": errors(decode.gradient(of_tiles), exact[name]),
                            "decoder_alone": errors(tiled.gradient(adjoints[name]), exact[name]),
                        }
                    label = case | {"residual": "random"} if name == "random" else case
                    result["gradients"].append(label | {"loss": None if name == "random" else name} | found)
    return result


def _control(
    decoder: CausalDecoder, z: Tensor, decode: CutDecode, adjoint: Tensor, exact: Tensor, config: Config
) -> dict[str, float]:
    """What must be zero: the error where nothing is far enough to be cut, and the library's distance from definition.

    Raises:
        AssertionError: one of them exceeds what rounding explains.
    """
    strips, rows, groups = config.strips[0], z.shape[-2], len(decoder.frame_groups(z.shape[2]))
    leaf = z.clone().requires_grad_()
    strategy = Chop(0, block=groups, recompute=True, pieces=True, strips=strips, space=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (of_library,) = torch.autograd.grad(chopgrad.decode(decoder, leaf, strategy), leaf, adjoint)
    found = {
        "error_at_full_height": errors(decode.gradient(adjoint, strips, rows), exact)["relative_error"],
        "library_from_definition": errors(of_library, decode.gradient(adjoint, strips, 1))["relative_error"],
    }
    for name, value in found.items():
        assert value < PARITY, f"{name} is {value:.1e}, but rounding explains no more than {PARITY:.1e}"
    return found


def _adjoint(loss_fn: Callable[..., Tensor], frames: Tensor, target: Tensor) -> Tensor:
    leaf = frames.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(leaf, target), leaf)[0]


def _psnr_db(x: Tensor, y: Tensor) -> float:
    """Of pixels in [-1, 1]; 200 for what is equal."""
    return 10 * math.log10(4 / max((x - y).square().mean().item(), 4e-20))


def main(config: Config) -> None:
    records = measure(config)
    cost = measure_cost(config.folder / "spatial_truncation-cost.json", config.full)
    figure(records, config.folder / "spatial_truncation.png")
    print(table(records))
    print_claims([*records, cost])


if __name__ == "__main__":
    run_main(main, Config, __doc__)
