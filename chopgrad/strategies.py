"""How to differentiate is a value: the points of one dial between full and truncated back-propagation.

Write ``T`` for the number of frame groups, ``A`` for the saved activations of one group, ``a`` for the features between
the pieces of one group and the graph of its largest piece, ``c`` for the state (causal cache) between two groups, ``D``
for the truncation distance and ``W`` for the block size.

===================================  =====================  ==========================  ===========================
strategy                             gradient               forwards + backwards/group  peak memory
===================================  =====================  ==========================  ===========================
``Full()``                           exact                  1 + 1                       T A
``Chop(D)``                          truncated at D         1 + (D+1)                   (D+1) A
``Chop(0, block=W)``                 inside blocks          1 + 1                       W A
``Chop(D, block=W)``                 at least D             1 + (1+D/W)                 (W+D) A
``Chop(D, block=W, recompute)``      the same               2+(D-1)/W + (1+D/W)         A + (W+D) c
``Exact(offload=False)``             exact                  2 + 1                       A + T c
``Exact(offload=True)``              exact                  2 + 1                       A + 4c, T c on the host
``Exact(offload=True, pieces=True)`` exact                  3 + 1                       a, T c on the host
``Exact(..., every=k)``              exact                  1 forward more              T c becomes (T/k + k) c
``Exact(..., strips=n)``             exact                  a little more               about a / n
``Exact()``                          exact                  1 + 1 to 4 + 1              what there is
``Sampled(K, strategy)``             unbiased for it        fewer                       that of the strategy
===================================  =====================  ==========================  ===========================

At 480x832 in bfloat16 the Wan 2.1 decoder has A = 5 GiB, c = 1.8 GiB and a = 4 GiB; A is less with
``decoder_for(vae, checkpoint=...)``.

Every strategy is read by the one engine (``chopgrad.engine``) as the same few settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Literal

import torch

from chopgrad.units import bytes_of


def _check_int(owner: str, name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class Plan:
    """What the engine reads: block size (None = one block of all groups), distance, and how memory is traded."""

    block: int | None
    distance: int
    recompute: bool
    offload: bool
    every: int | None = 1
    pieces: bool = False
    strips: int | None = None
    graphs: int = 0
    """Of the last groups, kept in spite of recompute."""
    space: int | None = None
    """Rows of the source beyond which a strip's adjoint is cut."""
    resident: int = 0
    """Pieces, from the first, whose inputs stay on the device in spite of offload."""


Strips = int | Literal["auto"] | None
"""In how many strips pieces are walked; ``"auto"``: the fewest that fit the memory that is free."""


def _check_strips(owner: str, strips: Strips, pieces: bool) -> None:
    if strips is not None:
        if strips != "auto":
            _check_int(owner, "strips", strips, 1)
        if not pieces:
            raise ValueError(f"{owner}: strips walk each piece some rows at a time, so they need pieces=True.")


def _number(strips: Strips) -> int | None:
    """None until it is chosen."""
    return None if strips == "auto" else strips


class _Written:
    """Represented as written in code, without settings left at their default."""

    def __repr__(self) -> str:
        words = [
            f"{value!r}" if field.default is MISSING else f"{field.name}={value!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(words)})"


@dataclass(frozen=True, repr=False)
class Full(_Written):
    """Ordinary back-propagation through the whole decoded video: exact, and memory grows with the video.

    Prefer it only where it fits; it is the reference that every other strategy is compared with.
    """

    def plan(self) -> Plan:
        return Plan(block=None, distance=0, recompute=False, offload=False)


@dataclass(frozen=True, repr=False)
class Chop(_Written):
    """Truncated back-propagation through the decoder's cache (ChopGrad, arXiv 2603.17812, Sec. 3.2).

    Frame groups are cut into blocks ``[a, b)`` of ``block`` groups. The latent, and every decoder parameter used, of a
    group in the block receives the gradient of the losses of groups up to ``b - 1 + distance``, and of no others.
    ``Chop(D)`` is the paper's scheme: the loss of group i reaches the latents i, i-1, ..., i-D.

    Args:
        distance: truncation distance D in frame groups, at least 0.
        block: groups differentiated together, at least 1. Larger blocks are never less accurate at the same distance
            and need fewer backward passes, at the price of ``block`` graphs (or states, with ``recompute``).
        recompute: keep states and rebuild one graph at a time, instead of keeping ``block + distance`` graphs.
        offload: what waits for its backward pass waits in host memory: states when recomputing, saved activations
            when graphs are kept.
        pieces: with ``recompute``, walk each group piece by piece (see ``Exact``).
        strips: with ``pieces``, walk each piece in so many strips of its rows, or ``"auto"`` (see ``Exact``).
        space: with ``strips``, truncate in space too (arXiv 2603.17812, Sec. 3.3): the adjoint of each strip of the
            frames is swept back alone, and dropped wherever it is more than ``space`` latent rows above or below the
            strip. The frames stay what they are. As many sweeps as there are strips: at least twice the
            work of exact strips, and no less memory (docs/findings.md).

    Raises:
        TypeError, ValueError: when a setting is not an int, or below its least value, or pieces without recompute.
    """

    distance: int
    block: int = 1
    recompute: bool = False
    offload: bool = False
    pieces: bool = False
    strips: Strips = None
    space: int | None = None

    def __post_init__(self) -> None:
        _check_int("Chop", "distance", self.distance, 0)
        _check_int("Chop", "block", self.block, 1)
        if self.pieces and not self.recompute:
            raise ValueError("Chop: pieces=True rebuilds graphs piece by piece, so it needs recompute=True.")
        _check_strips("Chop", self.strips, self.pieces)
        if self.space is not None:
            _check_int("Chop", "space", self.space, 0)
            if self.strips is None or self.strips == "auto":
                raise ValueError("Chop: space is the distance from a strip, so it needs a number of strips.")

    @property
    def is_automatic(self) -> bool:
        """Whether something of it is chosen when it is called."""
        return self.strips == "auto"

    def plan(self) -> Plan:
        return Plan(
            self.block, self.distance, self.recompute, self.offload, pieces=self.pieces, strips=_number(self.strips),
            space=self.space,
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Exact(_Written):
    """Exact gradient, as fast as the memory allows: it has no bias, and takes at most a few forward passes more.

    ``Exact()`` chooses by itself, once for each shape: graphs of the groups that fit are kept; else states wait on the
    device, on the host, or every k-th does; groups are walked piece by piece, and pieces in strips. With one of the
    settings below nothing is chosen: it is checkpointing at the group borders, graphs rebuilt one at a time.

    Args:
        within: what it may take on the device beyond what is there when it is called, in bytes or as "20GiB". Default:
            nine tenths of what is free; ``decode`` leaves four tenths of that to the loss.
        offload: keep the states in host memory (pinned when the device is CUDA), so that device memory does not
            depend on the number of frames.
        every: keep each ``every``-th state only, and rebuild those between with one more forward pass. States then take
            (T / every + every) c; ``every = sqrt(T)`` is least. Default: the smallest number with which they take at
            most half the memory that is free at the third group, on the host with ``offload``, else on the device.
        pieces: walk each group piece by piece (half a residual block, an upsampler, ...), so that one piece's graph
            exists at a time. With ``offload``, state and adjoint visit the device one piece's slice at a time.
        strips: with ``pieces``, walk each piece that is local in space in so many strips of its rows, so that the graph
            of one strip exists at a time; smaller pieces in fewer. With ``offload`` what enters a piece, state and
            adjoint visit the device strip by strip too. Each strip is run with a row or so beside it. ``"auto"``: the
            fewest that fit what is free, or ``within``.
    """

    offload: bool | None = None
    every: int | None = None
    pieces: bool | None = None
    strips: Strips = None
    within: int | str | None = None

    def __post_init__(self) -> None:
        if self.every is not None:
            _check_int("Exact", "every", self.every, 1)
        _check_strips("Exact", self.strips, bool(self.pieces))
        if self.within is not None and not self.is_automatic:
            raise ValueError(f"Exact: within chooses {', '.join(self._set)} itself: leave them out.")
        self.within_bytes  # noqa: B018  (what cannot be read is refused here)

    @property
    def _set(self) -> list[str]:
        return [name for name in ("offload", "every", "pieces", "strips") if getattr(self, name) is not None]

    @property
    def is_automatic(self) -> bool:
        """Whether its form, or the number of strips, is chosen when it is called."""
        return not self._set or self.strips == "auto"

    @property
    def within_bytes(self) -> int | None:
        """What it may take, if that was said."""
        if self.within is None or isinstance(self.within, str):
            found = bytes_of("Exact: within", self.within)
            if found == 0:
                raise ValueError("Exact: within must be more than 0 bytes.")
            return found
        _check_int("Exact", "within", self.within, 1)
        return self.within

    def plan(self) -> Plan:
        strips = _number(self.strips)
        return Plan(None, 0, True, bool(self.offload), every=self.every, pieces=bool(self.pieces), strips=strips)


@dataclass(frozen=True, repr=False)
class Sampled(_Written):
    """The losses of ``count`` frame groups, drawn anew at every call, in place of all of them.

    Each drawn loss is weighted by T / count, so value and gradient are unbiased for those of ``strategy``; their
    variance is the price. Every group up to the last one drawn is still decoded, with its full causal history, but
    graphs are built and swept only where a drawn loss reaches. Prefer it when the backward pass or the loss (a
    perceptual network) is what takes the time.

    Draws come from PyTorch's global CPU generator: ``torch.manual_seed`` repeats them.

    Args:
        count: groups drawn without replacement, at least 1; all of them where the video has fewer.
        strategy: how the drawn losses are differentiated.
    """

    count: int
    strategy: Full | Chop | Exact = Chop(1)

    def __post_init__(self) -> None:
        _check_int("Sampled", "count", self.count, 1)
        if not isinstance(self.strategy, Full | Chop | Exact):
            raise TypeError(f"Sampled: strategy must be Full(), Chop(...) or Exact(...), got {self.strategy!r}.")

    def plan(self) -> Plan:
        return self.strategy.plan()

    def weights(self, weights: Sequence[float]) -> list[float]:
        """The groups' weights in the total for one draw: scaled up where drawn, 0 elsewhere."""
        drawn = set(torch.randperm(len(weights), device="cpu")[: self.count].tolist())
        return [w * len(weights) / len(drawn) if i in drawn else 0.0 for i, w in enumerate(weights)]


Strategy = Full | Chop | Exact | Sampled

RECOMMENDED = Exact()
"""What ``decode``, ``frame_loss`` and ``patch`` do where nothing is said: exact, as fast as the memory allows."""
