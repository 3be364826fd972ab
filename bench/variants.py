"""What pays inside the engine: ``python -m bench.variants``.

The same strategy on the same video, with the decoder as it is and changed: recomputing inside a group
(``decoder_for(vae, checkpoint=...)``), weights and activations in channels-last order, and, with ``--compiled``, a step
compiled by ``torch.compile``. Each round times the plain decoder right before the variant, and the ratio is the result;
peak memory stands beside it. Gradients are compared with those of the plain decoder before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import nn

import chopgrad
from bench.cases import FULL_SIZE, Case, label
from bench.subject import Subject
from bench.test_time import seconds
from chopgrad import CausalDecoder, Chop, Exact, Strategy
from chopgrad.memory import PeakMemory
from suite.bootstrap import mean_interval
from suite.records import ROOT, provenance, write_record
from suite.tables import markdown_table, with_interval
from suite.vaes import EMBEDDED

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass
class Config:
    """Settings of the comparison."""

    vaes: tuple[str, ...] = tuple(EMBEDDED)
    """Embedded decoders, or published architectures on a GPU: full:wan2.1, full:wan2.2, full:cogvideox."""
    frames: int = 33
    size: tuple[int, int] = (64, 64)
    rounds: int = 5
    compiled: bool = False
    """Also a compiled step: compilation takes minutes on a small machine."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = ROOT / "results"
    """Folder of the records (variants/) and of the table (variants-<device>.md)."""


def channels_last(vae: Any) -> CausalDecoder:
    changed = copy.deepcopy(vae)
    for module in changed.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return chopgrad.decoder_for(changed)


def compiled(vae: Any) -> CausalDecoder:
    decoder: Any = chopgrad.decoder_for(vae)
    decoder.step = torch.compile(decoder.step, dynamic=False)
    return decoder


VARIANTS: dict[str, Callable[[Any], CausalDecoder]] = {
    "checkpoint=frame": lambda vae: chopgrad.decoder_for(vae, checkpoint="frame"),
    "checkpoint=residual": lambda vae: chopgrad.decoder_for(vae, checkpoint="residual"),
    "checkpoint=block": lambda vae: chopgrad.decoder_for(vae, checkpoint="block"),
    "channels last": channels_last,
    "compiled step": compiled,
}
STRATEGIES: tuple[Strategy, ...] = (Exact(), Exact(pieces=True), Chop(1))


def worth_measuring(variant: str, strategy: Strategy, with_compiled: bool) -> bool:
    """Walking pieces, a step is neither compiled nor recomputed in larger parts."""
    if variant == "compiled step" and not with_compiled:
        return False
    return not (strategy.plan().pieces and variant in ("checkpoint=residual", "checkpoint=block", "compiled step"))


def measure(subject: Subject, decoder: CausalDecoder, strategy: Strategy, rounds: int) -> dict[str, Any]:
    """Ratios of time and of peak memory, variant to plain decoder.

    Raises:
        AssertionError: the gradients differ by more than rounding.
    """
    plain = subject.decoder
    times: list[float] = []
    gradients, peaks = [], []
    for one in (plain, decoder):
        subject.decoder = one
        with PeakMemory(subject.case.device) as memory:
            _, gradient = subject.run(strategy)
        gradients.append(gradient.float())
        peaks.append(memory.peak_bytes)
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert error < TOLERANCE[subject.case.dtype], f"the gradient differs by {error:.1e}"
    for _ in range(rounds):
        subject.decoder = plain
        before = seconds(subject, strategy)
        subject.decoder = decoder
        times.append(seconds(subject, strategy) / before)
    subject.decoder = plain
    return {"time_ratio": list(mean_interval(times)), "memory_ratio": peaks[1] / peaks[0], "gradient_difference": error}


def main(config: Config) -> None:
    dtype = "bfloat16" if any(vae in FULL_SIZE for vae in config.vaes) else "float32"
    made_by = provenance(config.device)
    device = torch.device(config.device).type
    rows = []
    work = [(v, name, s) for v in config.vaes for name in VARIANTS for s in STRATEGIES]
    work = [(v, name, s) for v, name, s in work if worth_measuring(name, s, config.compiled)]
    subject: Subject | None = None
    for vae, name, strategy in track(work, description="variants", console=Console(stderr=True)):
        if subject is None or subject.case.vae != vae:
            case = Case(vae, config.frames, *config.size, Exact(), dtype=dtype, device=config.device)
            subject = Subject(case)
        metrics = measure(subject, VARIANTS[name](subject.decoder.vae), strategy, config.rounds)
        settings = subject.case.settings() | {"strategy": label(strategy), "variant": name, "rounds": config.rounds}
        file = f"{vae}-{name}-{label(strategy)}-{device}".replace("full:", "full-")
        file = "".join(c if c.isalnum() or c in ".-" else "_" for c in file)
        write_record(config.out / "variants" / f"{file}.json", settings, metrics, made_by)
        rows.append([vae, label(strategy), name, with_interval(metrics["time_ratio"], 2), metrics["memory_ratio"]])
    text = markdown_table(["decoder", "strategy", "variant", "time / plain", "peak memory / plain"], rows)
    where = f"{made_by['device']} ({made_by['threads']} threads), torch {made_by['torch']}, {made_by['date'][:10]}"
    size = f"{config.frames} frames of {config.size[0]}x{config.size[1]}, {dtype}"
    lines = [
        "# What pays inside the engine",
        "",
        f"{size}; measured on {where}: `{made_by['command'].strip()}`. Ratios to the same strategy on the plain",
        "decoder, timed in alternation (mean and 95 % bootstrap interval over rounds).",
        "",
        text,
        "",
    ]
    (config.out / f"variants-{device}.md").write_text("\n".join(lines))
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
