"""The forward pass of one frame group, piece by piece and without graphs.

A group is a chain of pieces, ``(features, state slice) -> (features, state slice)``: one piece of everything, or,
walked piece by piece, those of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chopgrad.offload import OffloadBuffer
from chopgrad.recurrence import Features, Group, Piece, Recurrence
from chopgrad.strips import Strips

Carry = list[Any]
"""What one group hands to the next: for each piece its slice of the state."""


class Forward:
    """Runs the groups of one video.

    Args:
        model: the recurrence.
        groups: its groups for this source.
        source: [batch, channels, length, h, w]; read, never written.
        by_pieces: walk the model's pieces, one by one.
        host: where states and features wait.
        strips: walk pieces strip by strip.
        resident: pieces, from the first, whose features stay on the device.

    Attributes:
        pieces: what a group runs, in order.
        repeats: groups run more than once. What changes whenever the decoder runs is then refused.
    """

    def __init__(
        self,
        model: Recurrence,
        groups: Sequence[Group],
        source: Tensor,
        by_pieces: bool,
        host: OffloadBuffer,
        strips: Strips | None = None,
        resident: int = 0,
    ) -> None:
        def everything(features: Features, state: Any) -> tuple[Features, Any]:
            y, state = model.step(features[0], state)
            return (y,), state

        self.pieces: list[Piece] = list(model.pieces()) if by_pieces else [everything]
        self.repeats = False
        self._model, self._groups, self._source = model, groups, source
        self._by_pieces, self._host, self._strips, self._resident = by_pieces, host, strips, resident
        self._buffers = [(name, x, x._version) for name, x in model.vae.named_buffers() if not x.is_inference()]

    def taken(self, i: int) -> Tensor:
        """What enters group i."""
        return self._source[:, :, self._groups[i].takes]

    def initial_carry(self) -> Carry:
        """What enters the first group."""
        state = self._model.initial_state()
        return self._host.put(list(state) if self._by_pieces else [state])

    def run(
        self, i: int, carry: Carry, inputs: list[Features] | None = None, to_the_end: bool = True
    ) -> tuple[Tensor, Carry]:
        """What group i yields, and the carry that enters the next group.

        Args:
            inputs: is given the features that enter each piece; of a single piece, what the group takes. They wait
                where the state waits.
            to_the_end: False: stop before the last piece, and pass on no carry.

        Raises:
            RuntimeError: a buffer changes, or random numbers are drawn, and groups run more than once.
        """
        features: Features = (self.taken(i),)
        if inputs is not None:
            inputs.append(features)
        onward = to_the_end and i + 1 < len(self._groups)
        after: Carry = []
        with torch.no_grad(), self.unchanged():
            for k, piece in enumerate(self.pieces if to_the_end else self.pieces[:-1]):
                wanted = inputs is not None and k + 1 < len(self.pieces)
                if self._strips:
                    waiting = inputs[-1] if inputs is not None and wanted else None
                    features, new, kept = self._strips.forward(piece, features, carry[k], onward, waiting)
                    after.append(new)
                    if inputs is not None and kept is not None:
                        inputs.append(tuple(kept))
                    continue
                entering, state = features, self._host.get(carry[k])
                self._host.fetch(carry[k + 1 : k + 2])
                features, new = piece(entering, state)
                after.append(self._host.put(new) if onward else None)
                if inputs is not None and wanted:
                    there = dict(zip(map(id, entering), inputs[-1], strict=True))
                    inputs.append(features if k + 1 < self._resident else self._waiting(features, there))
                del entering, state, new
        return (self._strips.joined(features[0]) if self._strips and to_the_end else features[0]), after

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises:
        RuntimeError: a buffer changes meanwhile, or random numbers are drawn, and groups run more than once.
        """
        predicted = self._source.is_meta or isinstance(self._source, FakeTensor)  # there are no values
        random = self._random_state() if self.repeats and not predicted else None
        yield
        self._check_buffers()
        if random is not None and not torch.equal(random, self._random_state()):
            raise RuntimeError(
                f"The {self._model.part} draws random numbers whenever it runs (a hook, dropout of its own?), so that "
                "a step cannot be repeated: call vae.eval(), or use ordinary back-propagation, Full()."
            )

    def inputs(self, i: int, carry: Carry) -> list[Features]:
        """The features that enter each piece of group i."""
        inputs: list[Features] = []
        self.run(i, carry, inputs, to_the_end=False)
        return inputs

    def _waiting(self, features: Features, waiting: dict[int, Any]) -> Features:
        """Features on their way to where they wait; a piece may have passed on some that wait already."""
        new = [x for x in features if id(x) not in waiting]
        waiting |= dict(zip(map(id, new), self._host.put(new), strict=True))
        return tuple(waiting[id(x)] for x in features)

    def _random_state(self) -> Tensor:
        device = self._source.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def _check_buffers(self) -> None:
        if not self.repeats:
            return
        changed = next((name for name, x, version in self._buffers if x._version != version), None)
        if changed is not None:
            raise RuntimeError(
                f"The {self._model.part}'s buffer '{changed}' changes whenever it runs (spectral norm in training "
                "mode?), so that a step cannot be repeated: call vae.eval(), or use ordinary back-propagation, Full()."
            )
