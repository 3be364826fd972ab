"""Which cases are measured, in which order.

By default the embedded decoders, in minutes on two cores. With ``--full`` the published architectures in bfloat16: far
more than a card does in an hour, so the most useful cases come first and each stage is complete before the next starts.
With ``--published`` the same architectures in float32 on short, small videos: hours on two cores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from bench.baselines import Baseline
from bench.cases import (
    ESTIMATES,
    FULL_SIZE,
    KEY_STRATEGIES,
    STRATEGIES,
    SWEEP,
    Case,
    Inside,
    Method,
    Whole,
    baselines,
    frame_groups,
    measurable,
)
from chopgrad import Chop, Exact, Full
from suite.losses import LOSSES
from suite.vaes import EMBEDDED


class Video(NamedTuple):
    """A size (height, width) and the lengths that are measured at it."""

    size: tuple[int, int]
    frames: tuple[int, ...]


FULL_SIZES = ("480x832", "720x1280", "256x448")
FULL_FRAMES = (13, 81, 97, 33, 49, 193, 25)
"""Full back-propagation at 480x832 fits 80 GiB at the first; the README speaks of the second."""
CURVE = Video((16, 16), (25, 65, 193))
"""Memory against frames, and whether it is constant: small frames, so that the long video takes seconds."""
FRONTIER = Video((40, 40), (33,))
"""Everything: memory, time and gradient error of all strategies and baselines."""
PAPER: tuple[Method, ...] = tuple(Chop(d) for d in (0, 1, 2, 4))
"""The paper's scheme against its distance (Fig. 6)."""
PUBLISHED: tuple[tuple[tuple[str, ...], Video], ...] = (
    (("wan2.1",), Video((128, 128), (9, 17))),
    (("wan2.1", "cogvideox", "wan2.2"), Video((64, 64), (9, 17, 41))),
    (("cogvideox", "wan2.2"), Video((128, 128), (9, 17))),
    (("wan2.1", "wan2.2", "cogvideox"), Video((256, 256), (5, 9))),
)
"""Full-size decoders on a CPU, stage by stage: what tells most for its minutes first."""
TIMED: tuple[Method, ...] = (
    Full(),
    Exact(offload=False),
    Exact(pieces=True),
    Inside("frame", Exact(pieces=True)),
    *PAPER,
    Chop(1, block=4),
    Whole(Exact(pieces=True)),
)
"""Of these also the time is measured there."""
COMPARED: tuple[Method, ...] = (
    *TIMED,
    Inside("frame", Chop(1)),
    *(Chop(d, block=4) for d in (0, 2, 4)),
    Whole(Chop(1)),
    Exact(offload=True),
    Exact(offload=True, pieces=True),
    Inside("frame", Exact(offload=True, pieces=True)),
)
"""The last three are predicted: a CPU has nowhere to offload to."""


@dataclass(frozen=True)
class Selection:
    """What is chosen on the command line; empty means all that the default or ``--full`` holds."""

    full: bool = False
    device: str = "cpu"
    vaes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    losses: tuple[str, ...] = ()
    published: bool = False

    def __post_init__(self) -> None:
        known = self.known_vaes
        for vae in self.vaes:
            if vae not in known:
                raise ValueError(f"--vaes: '{vae}' is not measured here; pass some of {', '.join(known)}.")
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise ValueError(f"--sizes takes HEIGHTxWIDTH in pixels, such as 480x832; got '{size}'.")
        for loss in self.losses:
            if loss not in LOSSES:
                raise ValueError(f"--losses: '{loss}' is unknown; pass some of {', '.join(LOSSES)}.")
        for count in self.frames:
            if count < 1 or count % 4 != 1:
                raise ValueError(f"--frames must be 1 + a multiple of 4, got {count}.")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Selection:
        options = json.loads(text)
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**chosen)

    @property
    def known_vaes(self) -> list[str]:
        """As written on the command line, without the prefix of the full-size ones."""
        return list(FULL_SIZE.values() if self.full or self.published else EMBEDDED)

    @property
    def folder(self) -> str:
        """Where the records lie within a folder of results."""
        return "published" if self.published else "."


def stages(selection: Selection) -> list[list[Case]]:
    """Cases in the order of their use; memory, then time, is measured stage by stage.

    Raises:
        ValueError: nothing is left of the selection.
    """
    if selection.full:
        ranked = sorted(_full(selection), key=lambda pair: pair[0])  # stable
        found = [[case for _, case in group] for _, group in groupby(ranked, key=lambda pair: pair[0])]
    elif selection.published:
        found = [stage for stage in _published(selection) if stage]
    else:
        found = [list(_small(selection))]
    if not any(found):
        raise ValueError(
            f"No case is left of vaes {selection.vaes or 'all'}, sizes {selection.sizes or 'all'}, frames "
            f"{selection.frames or 'all'}, losses {selection.losses or 'all'}: leave one of them out, or add --full."
        )
    return found


def cases(selection: Selection) -> list[Case]:
    return [case for stage in stages(selection) for case in stage]


def is_timed(case: Case) -> bool:
    """At full size everything, on a CPU what is in ``TIMED``; of the embedded decoders the frontier, and the paper's
    scheme on a longer video.
    """
    if case.vae in FULL_SIZE:
        return case.device != "cpu" or case.strategy in TIMED
    longer = case.frames == CURVE.frames[1] and case.strategy in PAPER
    return longer or not _on_curve(case)


def has_error(case: Case) -> bool:
    """Where the gradient's error is measured: trained weights only, and at the frontier's size."""
    return case.vae in EMBEDDED and not _on_curve(case)


def is_predicted(case: Case) -> bool:
    """Beside every measurement at full size. Of the embedded decoders, where a prediction takes as long as the
    measurement, the strategies at the frontier and at the longest video, and all that cannot be measured."""
    longest = case.frames == CURVE.frames[-1] and case.strategy in KEY_STRATEGIES
    compared = longest or not (_on_curve(case) or isinstance(case.strategy, Baseline))
    return case.vae in FULL_SIZE or compared or not measurable(case)


def _on_curve(case: Case) -> bool:
    return (case.height, case.width) == CURVE.size


def _small(selection: Selection) -> Iterator[Case]:
    for vae in selection.vaes or tuple(EMBEDDED):
        for loss in selection.losses or ("mse",):
            for video in (CURVE, FRONTIER):
                height, width = video.size
                if selection.sizes and f"{height}x{width}" not in selection.sizes:
                    continue
                methods: tuple[Method, ...] = STRATEGIES
                if video is FRONTIER:
                    methods += (*ESTIMATES, *baselines(vae, height, width))
                for frames in (n for n in video.frames if not selection.frames or n in selection.frames):
                    case = Case(vae, frames, height, width, Full(), loss, device=selection.device)
                    yield from (replace(case, strategy=method) for method in methods)


def _published(selection: Selection) -> Iterator[list[Case]]:
    names = {name: vae for vae, name in FULL_SIZE.items()}
    for architectures, video in PUBLISHED:
        height, width = video.size
        if selection.sizes and f"{height}x{width}" not in selection.sizes:
            continue
        yield [
            Case(names[name], frames, height, width, method, loss, device=selection.device)
            for name in architectures
            if not selection.vaes or name in selection.vaes
            for frames in video.frames
            if not selection.frames or frames in selection.frames
            for loss in selection.losses or ("mse",)
            for method in COMPARED
            if _fits(method, frame_groups(name, frames))
        ]


def _fits(method: Method, groups: int) -> bool:
    """Whether a window of block + D groups fits into the video: one that is cut short is another's."""
    return not isinstance(method, Chop) or method.distance + method.block <= groups


def _full(selection: Selection) -> Iterator[tuple[tuple[int, ...], Case]]:
    """(rank, case): the smaller the rank, the earlier."""
    names = {name: vae for vae, name in FULL_SIZE.items()}
    for v, name in enumerate(selection.vaes or tuple(names)):
        for s, size in enumerate(selection.sizes or FULL_SIZES):
            height, width = map(int, size.split("x"))
            if name == "wan2.2" and height % 32:
                height -= height % 32  # 704 instead of 720: its latents have 16 pixels, in patches of two
            for loss in selection.losses or ("mse", "lpips"):
                for f, frames in enumerate(selection.frames or FULL_FRAMES):
                    video = Case(names[name], frames, height, width, Full(), loss, "bfloat16", selection.device)
                    for method in (*SWEEP, *baselines(video.vae, height, width)):
                        key = method in KEY_STRATEGIES
                        others = (v > 0) + (loss != "mse")  # the first architecture and MSE before everything else
                        rank = (others, 0 if key else 1, 0 if f < 2 else 1, s, v, f)
                        yield rank, replace(video, strategy=method)
