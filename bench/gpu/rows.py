"""What is measured on a card, the most telling rows first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.baselines import SavedOnCpu
from bench.cases import Case, Inside, Method, label
from chopgrad import Chop, Exact, Full

Call = Literal["frame_loss", "decode", "patch", "plain"]
"""How the loss meets the decoder: streamed, through ``chopgrad.decode``, a patched VAE, or the VAE as it is."""

PIECES = Exact(offload=True, pieces=True, every=1)
LEAST = Inside("frame", PIECES)
"""The exact gradient that needs the least device memory without strips."""
STRIPS = replace(PIECES, strips=8)
OFFLOAD = Exact(offload=True, every=1)
LARGE_CARD_GIB = 120


@dataclass(frozen=True)
class Row:
    """One video, and the methods that are compared on it in one process.

    Args:
        name: a good file name.
        methods: times are ratios to the first that runs.
        rounds: timed repetitions of each; every one is timed right after the reference.
        repeats: further calls, of which only memory is recorded.
        error: also compare the gradients with that of ``LEAST`` in float32.
        channels_last: the decoder's weights and latents in that memory format.
    """

    name: str
    vae: str
    frames: int
    height: int
    width: int
    methods: tuple[tuple[Call, Method], ...]
    rounds: int = 2
    repeats: int = 0
    error: bool = False
    channels_last: bool = False

    @property
    def megapixels(self) -> float:
        return self.frames * self.height * self.width / 1e6

    def case(self, method: Method, dtype: str, device: str) -> Case:
        return Case(self.vae, self.frames, self.height, self.width, method, "mse", dtype, device)


def streamed(*methods: Method) -> tuple[tuple[Call, Method], ...]:
    return tuple(("frame_loss", method) for method in methods)


def rows(card_gib: float) -> list[Row]:
    """In the order of their use, for a card with so much memory."""
    large = card_gib >= LARGE_CARD_GIB
    wan = ("full:wan2.1", 13, 480, 832)
    found = [
        Row(
            "wan-short",
            *wan,
            streamed(
                Full(), Exact(offload=False), OFFLOAD, PIECES, LEAST, STRIPS, Exact(), Chop(0), Chop(1), Chop(2),
                Chop(1, block=4), Inside("residual", Chop(1)),
            ),
            error=True,
        ),
        Row(
            "cogvideox-short",
            "full:cogvideox",
            17 if large else 9,
            480,
            720,
            streamed(Full(), PIECES, LEAST, STRIPS, Exact(), Chop(0), Chop(1)),
            rounds=1,
        ),
        Row(
            "wan-long",
            "full:wan2.1",
            81,
            480,
            832,
            streamed(Exact(), STRIPS, PIECES, Chop(1), LEAST, OFFLOAD, Chop(0)),
            rounds=1,
        ),
        Row(
            "wan-720p",
            "full:wan2.1",
            97,
            720,
            1280,
            streamed(
                replace(STRIPS, every=4), Exact(), Inside("frame", replace(PIECES, every=4)),
                *[Chop(1)] * large,
            ),
            rounds=0,
        ),
        Row(
            "calls",
            *wan,
            (("plain", Full()), ("patch", LEAST), ("decode", LEAST), ("frame_loss", LEAST), ("patch", Chop(1))),
        ),
        Row(
            "cogvideox-long",
            "full:cogvideox",
            49,
            480,
            720,
            streamed(PIECES, LEAST, STRIPS, OFFLOAD),
            rounds=1,
        ),
        Row("wan2.2-short", "full:wan2.2", 13 if large else 9, 704, 1280, streamed(Full(), OFFLOAD, LEAST, Chop(1))),
        Row("repeated", "full:wan2.1", 9, 480, 832, streamed(LEAST), rounds=0, repeats=40),
        Row("channels-last", *wan, streamed(Full(), OFFLOAD, LEAST, Chop(1)), channels_last=True),
        Row("saved-on-cpu", "full:wan2.1", 5, 480, 832, streamed(Full(), SavedOnCpu(), OFFLOAD)),
        Row("activations-on-host", *wan, streamed(Full(), Chop(1, offload=True)), rounds=1),
        *([Row("wan-medium", "full:wan2.1", 25, 480, 832, streamed(Full(), OFFLOAD, LEAST, Chop(1)))] * large),
    ]  # fmt: skip
    return found


def methods_by_label() -> dict[str, Method]:
    """Every method that is measured on some card, by what records call it; and ``every`` left to the library."""
    methods = {method for gib in (0.0, 1000.0) for row in rows(gib) for _, method in row.methods}
    return {label(method): method for method in (*methods, Exact(every=1))}


def tiny(found: Sequence[Row]) -> list[Row]:
    """The same on the embedded decoders and a few pixels: a rehearsal that a CPU does in a minute."""
    vaes = {"full:wan2.1": "wan2.1", "full:wan2.2": "wan2.1", "full:cogvideox": "cogvideox"}
    return [
        replace(row, vae=vaes[row.vae], frames=9, height=16, width=16, repeats=min(row.repeats, 2)) for row in found
    ]
