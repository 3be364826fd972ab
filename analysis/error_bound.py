"""Does the bound on the truncation error hold, and which distance does it choose? ``python analysis/error_bound.py``.

Sec. 3.2 of arXiv 2603.17812 bounds the error of the gradient truncated at distance D. Three bounds, each for the
gradient g_j of one latent group, against the measured error ||g_j - g_j^D|| (Frobenius norm over the group's latent):

(a) the full sum, with measured operator norms:      sum_{i > j+D} ||J_ij|| ||dL_i/dx_i||
(b) its geometric tail, with G = max_i ||dL_i/dx_i||: C G exp(-alpha (D+1)) / (1 - exp(-alpha))
(c) the paper's rule for a tolerance eps:            D >= log(C / eps) / alpha

Two meanings of eps are tried, because the rule names a tolerance and not what it is a tolerance of: the absolute error
of one latent group's gradient (in units of loss per latent), and that error relative to ||g_j||. Solving (b) <= eps for
D gives the corrected rule

    D >= log(C G / (eps (1 - exp(-alpha)))) / alpha - 1.

It differs from the paper's by G, without which the rule depends on the unit of the loss, and by the factor
1 / (exp(alpha) - 1), which is above 1 exactly where alpha < log 2.

C and alpha come from the operator norms of all crops but those of the clip in question (but the crop, with one clip);
alpha by least squares, C as the smallest that bounds all of those pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from analysis.bounds.claims import claims
from analysis.bounds.figure import figure
from analysis.bounds.summary import TOLERANCES, summarise
from analysis.bounds.truncation import (
    Case,
    measure_cases,
)
from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.settings import OnClips
from chopgrad import CausalDecoder
from suite.command_line import run_main
from suite.losses import loss_by_name
from suite.printing import print_claims
from suite.records import Record
from suite.vaes import load_vae


@dataclass
class Config(OnClips):
    """Settings of the test of the error bound."""

    full: bool = False
    """LPIPS too."""

    def crops(self, groups_of_eight: bool) -> Crops:
        # CogVideoX has 8 frames a group: more frames for as many distances.
        frames = 49 if groups_of_eight else 33
        return Crops(self.clips, count=2, frames=frames, size=(32, 32))

    @property
    def losses(self) -> tuple[str, ...]:
        return ("mse", "l1", "lpips") if self.full else ("mse", "l1")


def measure(config: Config) -> list[Record]:
    """One record for each decoder."""
    losses = [loss_by_name(name, config.device) for name in config.losses]
    records = []
    for source in config.vaes:
        name = short_name(source)
        crops = config.crops("cog" in name.lower())

        def one(decoder: CausalDecoder, latents: Tensor, video: Tensor) -> dict[str, Any]:
            count = len(decoder.frame_groups(latents.shape[2]))
            # The last groups have too few groups behind them for a distance to be chosen.
            js = sorted({1, count // 2})
            js = [j for j in js if j < count]
            found = measure_cases(decoder, latents, video, losses, js)
            return {"latent_groups": js, "cases": [[_plain(c) for c in of_loss] for of_loss in found]}

        settings = {"full": config.full, "losses": list(config.losses), "relative_tolerances": list(TOLERANCES)}
        model = load_vae(source, config.device, subfolder=config.subfolder)
        record = measure_crops(config.folder / f"error_bound-{name}.json", (source, model), crops, one, settings)
        elements = 3 * crops.frames * crops.size[0] * crops.size[1]
        summary = summarise(record.metrics["samples"], list(config.losses), elements)
        records.append(conclude(record, "summary_of_bounds", summary, claims(name, summary)))
    return records


def _plain(case: Case) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(case).items()}


def main(config: Config) -> None:
    records = measure(config)
    figure(records, config.folder / "error_bound.png")
    print_claims(records)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
