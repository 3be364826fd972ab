"""What truncation in space saves beside exact strips: bytes by the planner, operations counted, time on a CPU.

Bytes and operations are those of the published architecture at full size on tensors that have shapes but no data. Time
is that of an embedded decoder, in turns, so that both suffer alike from what else a machine does.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import chopgrad
from chopgrad import Chop, Exact, Strategy
from chopgrad.planner import plan
from chopgrad.planner.architectures import build, latent_frames_of, spatial_factor
from chopgrad.shapes import ShapesOnly
from suite.claims import Claim, Verdict
from suite.progress import track
from suite.records import Record, finished, provenance, read_record, write_record
from suite.vaes import EMBEDDED, load_vae

ROUNDS = 3
WHOLE, EXACT, BOTH = "exact", "exact in strips", "cut at k=2 and D=1"
SAVED = 0.95
"""Of what exact strips take: more than this is no saving."""


class Operations(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions, also in sweeps inside a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def strategies(groups: int, strips: int, full: bool) -> dict[str, Strategy]:
    """What is compared: time is not truncated, but in the last."""

    def cut(space: int) -> Chop:
        return Chop(0, groups, recompute=True, offload=True, pieces=True, strips=strips, space=space)

    least: dict[str, Strategy] = {
        WHOLE: Exact(offload=True, pieces=True),
        EXACT: Exact(offload=True, pieces=True, strips=strips, every=1),
        "cut at k=0": cut(0),
    }
    both = Chop(1, recompute=True, offload=True, pieces=True, strips=strips, space=2)
    return least | {"cut at k=2": cut(2), BOTH: both} if full else least


def operations(vae: str, frames: int, height: int, width: int, strategy: Strategy) -> int:
    """Of one decode and its backward pass."""
    with ShapesOnly(), torch.device("meta"):
        decoder = chopgrad.decoder_for(build(vae, torch.bfloat16, None).eval().requires_grad_(False))
        factor, count = spatial_factor(decoder, torch.bfloat16), latent_frames_of(decoder, frames)
        size = (1, decoder.latent_channels, count, height // factor, width // factor)
        latents = torch.empty(size, dtype=torch.bfloat16).requires_grad_()
        with Operations() as counted:
            _gradient(decoder, latents, strategy)
    return counted.count


def seconds(vae: str, rows: int, columns: int, asked: Mapping[str, Strategy]) -> dict[str, list[float]]:
    """CPU seconds of each round, of an embedded decoder at so many latents in each of three groups."""
    decoder = chopgrad.decoder_for(load_vae(vae))
    latents = torch.randn(1, decoder.latent_channels, 3, rows, columns).requires_grad_()
    found: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(ROUNDS):
        for name, strategy in asked.items():
            begun = time.process_time()
            _gradient(decoder, latents, strategy)
            found[name].append(time.process_time() - begun)
    return found


def _gradient(decoder: chopgrad.CausalDecoder, latents: Tensor, strategy: Strategy) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = chopgrad.decode(decoder, latents, strategy)
    torch.autograd.grad(frames, latents, torch.ones_like(frames))


def measure_cost(path: Path, full: bool) -> Record:
    """The record of the costs; one that is there already is kept if its code and settings are the same."""
    vae, frames, height, width = ("wan2.1", 17, 480, 832) if full else (str(EMBEDDED["wan2.1"]), 5, 32, 16)
    strips, timed = (4, (16, 4)) if full else (2, (4, 2))
    settings = {
        "architecture": Path(vae).name, "frames": frames, "height": height, "width": width, "dtype": "bfloat16",
        "strips": strips, "rounds": ROUNDS, "timed_latents": list(timed), "full": full,
    }  # fmt: skip
    made_by = provenance()
    if old := finished(path, settings, made_by):
        return old
    groups = 1 + (frames - 1) // 4
    rows = []
    asked = strategies(groups, strips, full)
    for name, strategy in track(asked.items(), "costs"):
        (predicted,) = plan(vae, frames, height, width, strategies=[strategy], checkpoint="frame")
        rows.append({
            "name": name,
            "device_bytes": predicted.device_bytes,
            "host_bytes": predicted.host_bytes,
            "operations": operations(vae, frames, height, width, strategy),
        })  # fmt: skip
    of_three = {k: s for k, s in strategies(3, strips, full).items() if k != BOTH}
    metrics = {"costs": rows, "cpu_seconds": seconds("wan2.1", *timed, of_three)}
    metrics["claims"] = [asdict(claim) for claim in cost_claims(settings, metrics)]
    write_record(path, settings, metrics, made_by)
    return read_record(path)


def cost_claims(settings: dict[str, Any], metrics: dict[str, Any]) -> list[Claim]:
    rows = {row["name"]: row for row in metrics["costs"]}
    reference, cut = rows[EXACT], [row for name, row in rows.items() if name.startswith("cut at")]
    asked = {"device_bytes": "device", "host_bytes": "host", "operations": "operations"}
    shares = {row["name"]: {k: row[k] / reference[k] for k in asked} for row in cut}
    saves = [f"{asked[k]} {share:.2f} ({name})" for name, all_ in shares.items() for k, share in all_.items()
             if share < SAVED]  # fmt: skip
    verdict: Verdict = "fails" if saves else "holds"
    lasts = metrics["cpu_seconds"]
    times = {
        name: statistics.median(a / b for a, b in zip(lasts[name], lasts[EXACT], strict=True))
        for name in lasts
        if name.startswith("cut at")
    }
    gib = f"{reference['device_bytes'] / 2**30:.2f} GiB, host {reference['host_bytes'] / 2**30:.1f} GiB"
    whole = rows[WHOLE]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{asked[k]} {share:.2f}" for k, share in all_.items())
        + (f", CPU time of the embedded decoder {times[name]:.2f}" if name in times else "")
        for name, all_ in shares.items()
    )  # fmt: skip
    return [
        Claim(
            "Truncation in space saves nothing that exact strips do not: neither device memory, nor host memory, nor "
            "operations.",
            "ours",
            verdict,
            f"{settings['architecture']}, {settings['frames']} frames of {settings['height']}x{settings['width']}, "
            f"{settings['strips']} strips, predicted: exact strips take {gib} (without strips "
            f"{whole['device_bytes'] / 2**30:.2f}, {whole['host_bytes'] / 2**30:.1f}; operations "
            f"{whole['operations'] / reference['operations']:.2f}); of that, {told}",
        )
    ]
