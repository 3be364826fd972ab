"""What the analyses need on the published VAEs, by the planner: ``python -m report.docs.memory_of_analyses``.

Each analysis keeps the whole graph of one crop, in float32: that is ``Full()`` for a video of the crop's size. The
sizes are read from the scripts' own settings. (Those on the small backbone keep the graphs of four crops at once.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from analysis import backbone_gradient, error_bound, gradient_bias, spatial_locality, temporal_locality
from chopgrad import Full
from chopgrad.planner import plan
from suite.command_line import run_main
from suite.tables import markdown_table

VAES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan2.2",
    "THUDM/CogVideoX-2b": "cogvideox",
}


HALF = "--dtype bfloat16"


def crops(architecture: str) -> dict[str, tuple[int, tuple[int, int]]]:
    """Frames and size of a crop of each analysis, with its default settings and with those that the page gives."""
    task = backbone_gradient.Config().task
    bias, small = gradient_bias.Config(), temporal_locality.Config().crops
    full, bound = temporal_locality.Config(full=True).crops, error_bound.Config().crops(architecture == "cogvideox")
    space = spatial_locality.Config(size=(256, 256) if architecture == "wan2.2" else (128, 128)).crops
    return {
        "gradient_bias": (bias.frames, bias.size),
        "gradient_bias --size 128 224": (bias.frames, (128, 224)),
        "temporal_locality": (small.frames, small.size),
        "temporal_locality --full": (full.frames, full.size),
        "error_bound": (bound.frames, bound.size),
        "spatial_locality": (space.frames, space.size),
        "backbone_gradient": (task.frames, (task.size, task.size)),
        f"backbone_gradient --size 256 {HALF}": (task.frames, (256, 256)),
    }


@dataclass
class Config:
    """Settings of the table: there are none."""


def main(config: Config) -> None:
    rows = []
    for hub_id, architecture in VAES.items():
        for name, (frames, size) in crops(architecture).items():
            dtype = torch.bfloat16 if name.endswith(HALF) else torch.float32
            (found,) = plan(architecture, frames, *size, dtype=dtype, strategies=[Full()])
            video = f"{frames} frames of {size[0]}x{size[1]}"
            rows.append([hub_id.partition("/")[2], name, video, f"{found.device_bytes / 2**30:.1f}"])
    print(markdown_table(["VAE", "analysis", "crop", "GiB"], rows))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
