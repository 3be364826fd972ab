"""What pays inside the engine: ``python -m bench.variants``.

The same strategy on the same video, with the decoder as it is and changed: recomputing inside a group
(``decoder_for(vae, checkpoint=...)``), weights and activations in channels-last order, graphs that keep what PyTorch's
own operators keep, and, with ``--compiled``, a step compiled by ``torch.compile``. Each round times the plain decoder
right before the variant, and the ratio is the result; peak memory stands beside it. Gradients are compared with those
of the plain decoder before anything is timed. The table is made from the records and stands in docs/engine.md, where
the page has a place for the device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config as functorch_config
from rich.console import Console
from torch import Tensor, nn

import chopgrad
import chopgrad.decoders.cogvideox
import chopgrad.pieces.wan
from bench.cases import FULL_SIZE, Case, label
from bench.memory import is_out_of_memory
from bench.subject import Subject
from bench.test_time import seconds
from chopgrad import CausalDecoder, Chop, Exact, Strategy, frozen
from chopgrad.memory import PeakMemory
from chopgrad.recurrence import Features, Piece
from suite.bootstrap import mean_interval
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT, Record, provenance, read_records, write_record
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
    variants: tuple[str, ...] = ()
    """Which ones; all if none is named."""
    compiled: bool = False
    """Also a compiled step: compilation takes ten minutes a decoder on a small machine."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = ROOT / "results" / "variants"
    """Folder of the records."""
    page: Path = ROOT / "docs" / "engine.md"
    """Page that holds the table."""


def channels_last(vae: Any) -> CausalDecoder:
    changed = copy.deepcopy(vae)
    for module in changed.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return chopgrad.decoder_for(changed, checkpoint=None)


def compiled(vae: Any) -> CausalDecoder:
    torch.compiler.reset()  # all decoders share the code of a step, and PyTorch compiles a code eight times at the most
    # Chop(1) goes back through a graph more than once. PyTorch's cache on disk does not tell the settings apart, and
    # code of the other one gives wrong gradients.
    functorch_config.donated_buffer = False
    torch.compiler.config.cache_key_tag = "donated_buffer=False"
    decoder: Any = chopgrad.decoder_for(vae, checkpoint=None)
    decoder.step = torch.compile(decoder.step, dynamic=False)
    return decoder


@contextmanager
def _stock() -> Iterator[None]:
    """What the library does to keep less in a graph is left out."""
    with (
        patch.object(frozen, "_DIMENSIONS", {}),
        patch.object(chopgrad.pieces.wan, "takes", lambda norm: False),
        patch.object(chopgrad.decoders.cogvideox, "takes", lambda *args: False),
    ):
        yield


def stock_graphs(vae: Any) -> CausalDecoder:
    """Graphs keep what the operators of PyTorch and the modules of the VAE keep."""
    decoder: Any = chopgrad.decoder_for(vae, checkpoint=None)
    blocks = decoder.blocks()

    def run(piece: Piece, features: Features, state: Any) -> tuple[Features, Any]:
        with _stock():
            return piece(features, state)

    decoder.blocks = lambda: [[[partial(run, piece) for piece in unit] for unit in block] for block in blocks]
    return decoder


def is_compiled(decoder: CausalDecoder) -> bool:
    return "step" in vars(decoder)


VARIANTS: dict[str, Callable[[Any], CausalDecoder]] = {
    "checkpoint=frame": lambda vae: chopgrad.decoder_for(vae, checkpoint="frame"),
    "checkpoint=residual": lambda vae: chopgrad.decoder_for(vae, checkpoint="residual"),
    "checkpoint=block": lambda vae: chopgrad.decoder_for(vae, checkpoint="block"),
    "channels last": channels_last,
    "compiled step": compiled,
    "stock graphs": stock_graphs,
}
IN_STRIPS = {"2 strips": 2, "4 strips": 4}
"""Not of the decoder, but of a strategy that walks pieces."""
STRATEGIES: tuple[Strategy, ...] = (Exact(offload=False), Exact(pieces=True), Chop(1))


def worth_measuring(variant: str, strategy: Strategy, with_compiled: bool) -> bool:
    """Walking pieces, a step is neither compiled nor recomputed in larger parts."""
    if variant == "compiled step" and not with_compiled:
        return False
    if variant in IN_STRIPS:
        return strategy.plan().pieces
    return not (strategy.plan().pieces and variant in ("checkpoint=residual", "checkpoint=block", "compiled step"))


def varied(variant: str, strategy: Any) -> Strategy:
    """The strategy of the variant."""
    return replace(strategy, strips=IN_STRIPS[variant]) if variant in IN_STRIPS else strategy


def measure(
    subject: Subject, decoder: CausalDecoder, strategy: Strategy, other: Strategy, rounds: int
) -> dict[str, Any]:
    """Ratios of time and of peak memory, variant to plain decoder.

    Args:
        decoder, other: of the variant.

    The memory of a compiled step is known on CUDA only: elsewhere it is followed operator by operator, and compiled
    code is no such thing.

    Raises:
        AssertionError: the gradients differ by more than rounding.
    """
    plain = subject.decoder
    try:
        gradients: list[Tensor] = []
        for subject.decoder, how in ((plain, strategy), (decoder, other)):
            _, gradient = subject.run(how)  # a compiled step is compiled here, before anything is timed
            gradients.append(gradient.float())
        error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
        assert error < TOLERANCE[subject.case.dtype], f"the gradient differs by {error:.1e}"
        times: list[float] = []
        for _ in range(rounds):
            subject.decoder = plain
            before = seconds(subject, strategy)
            subject.decoder = decoder
            times.append(seconds(subject, other) / before)
        memory = None
        if torch.device(subject.case.device).type == "cuda" or not is_compiled(decoder):
            memory = _peak(subject, other)
            subject.decoder = plain
            memory /= _peak(subject, strategy)
    finally:
        subject.decoder = plain
    return {"time_ratio": list(mean_interval(times)), "memory_ratio": memory, "gradient_difference": error}


def _peak(subject: Subject, strategy: Strategy) -> float:
    with PeakMemory(subject.case.device) as memory:
        subject.run(strategy)
    return memory.peak_bytes


def table(records: Sequence[Record]) -> str:
    """Markdown: where it was measured, and a row per decoder, strategy and variant."""
    strategies, variants = [label(s) for s in STRATEGIES], [*VARIANTS, *IN_STRIPS]
    rank = lambda s: (s["vae"], strategies.index(s["strategy"]), variants.index(s["variant"]))  # noqa: E731
    ranked = sorted(records, key=lambda r: rank(r.settings))
    rows = [
        [r.settings["vae"], r.settings["strategy"], r.settings["variant"]]
        + [with_interval(r.metrics["time_ratio"], 2), _ratio(r.metrics["memory_ratio"])]
        for r in ranked
    ]
    s, p = records[0].settings, records[0].provenance
    code = f"commit {(p['commit'] or 'unknown')[:10]}{' with local changes' if p['dirty'] else ''}"
    lines = [
        f"{s['frames']} frames of {s['height']}x{s['width']}, {s['dtype']}, {s['rounds']} rounds, on {p['device']} "
        f"({p['threads']} threads), torch {p['torch']}, {p['date'][:10]}, {code}:",
        f"`{p['command'].strip()}`.",
        "Ratios to the same strategy on the plain decoder, timed in alternation (mean and 95 % bootstrap interval over",
        "rounds).",
        "",
        markdown_table(["decoder", "strategy", "variant", "time / plain", "peak memory / plain"], rows),
    ]
    return "\n".join(lines)


def _ratio(x: float | None) -> str:
    return "not seen" if x is None else f"{x:.2f}"


def filled(page: str, device: str, text: str) -> str:
    """A page with the table in its place for the device: between two comments that stay."""
    place = re.compile(rf"(<!-- variants: {device} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}{text}{match[2]}", page)


def main(config: Config) -> None:
    dtype = "bfloat16" if any(vae in FULL_SIZE for vae in config.vaes) else "float32"
    made_by = provenance(config.device)
    device = torch.device(config.device).type
    work = [
        (v, name, s) for v in config.vaes for name in config.variants or (*VARIANTS, *IN_STRIPS) for s in STRATEGIES
    ]
    work = [(v, name, s) for v, name, s in work if worth_measuring(name, s, config.compiled)]
    subject: Subject | None = None
    console = Console(stderr=True)
    for vae, name, strategy in track(work, description="variants"):
        if subject is None or subject.case.vae != vae:
            case = Case(vae, config.frames, *config.size, Exact(offload=False), dtype=dtype, device=config.device)
            subject = Subject(case)
        try:
            decoder = VARIANTS[name](subject.decoder.vae) if name in VARIANTS else subject.decoder
            metrics = measure(subject, decoder, strategy, varied(name, strategy), config.rounds)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            console.print(f"{vae}, {label(strategy)}, {name}: out of memory")
            continue
        settings = subject.case.settings() | {"strategy": label(strategy), "variant": name, "rounds": config.rounds}
        file = f"{vae}-{name}-{label(strategy)}-{device}".replace("full:", "full-")
        file = "".join(c if c.isalnum() or c in ".-" else "_" for c in file)
        write_record(config.out / f"{file}.json", settings, metrics, made_by)
    text = table([r for r in read_records(config.out) if torch.device(r.settings["device"]).type == device])
    print(text)
    if config.page.is_file():
        config.page.write_text(filled(config.page.read_text(), device, text))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
