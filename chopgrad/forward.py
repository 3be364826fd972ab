"""The forward pass of one frame group, piece by piece and without graphs.

A group is a chain of pieces, ``(features, state slice) -> (features, state slice)``: one piece of everything, or,
walked piece by piece, those of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chopgrad.decoders.base import CausalDecoder, Features, FrameGroup, Piece
from chopgrad.offload import OffloadBuffer

Carry = list[Any]
"""What one group hands to the next: for each piece its slice of the state."""


class Forward:
    """Runs the groups of one video.

    Args:
        decoder: the recurrence.
        groups: its frame groups for these latents.
        latents: [batch, channels, latent_frames, h, w]; read, never written.
        by_pieces: walk the decoder's pieces, one by one.
        host: where states and features wait.

    Attributes:
        pieces: what a group runs, in order.
        repeats: groups run more than once. What changes whenever the decoder runs is then refused.
    """

    def __init__(
        self,
        decoder: CausalDecoder,
        groups: Sequence[FrameGroup],
        latents: Tensor,
        by_pieces: bool,
        host: OffloadBuffer,
    ) -> None:
        def everything(features: Features, state: Any) -> tuple[Features, Any]:
            frames, state = decoder.step(features[0], state)
            return (frames,), state

        self.pieces: list[Piece] = list(decoder.pieces()) if by_pieces else [everything]
        self.repeats = False
        self._decoder, self._groups, self._latents = decoder, groups, latents
        self._by_pieces, self._host = by_pieces, host
        self._buffers = [(name, x, x._version) for name, x in decoder.vae.named_buffers() if not x.is_inference()]

    def latent(self, i: int) -> Tensor:
        """What enters group i."""
        return self._latents[:, :, self._groups[i].latents]

    def initial_carry(self) -> Carry:
        """What enters the first group."""
        state = self._decoder.initial_state()
        return self._host.put(list(state) if self._by_pieces else [state])

    def run(
        self, i: int, carry: Carry, inputs: list[Features] | None = None, to_the_end: bool = True
    ) -> tuple[Tensor, Carry]:
        """The frames of group i, and the carry that enters the next group.

        Args:
            inputs: is given the features that enter each piece; of a single piece, its latent. They wait where the
                state waits.
            to_the_end: False: stop before the last piece, and pass on no carry.

        Raises:
            RuntimeError: a buffer changes whenever the decoder runs, and groups run more than once.
        """
        features: Features = (self.latent(i),)
        if inputs is not None:
            inputs.append(features)
        onward = to_the_end and i + 1 < len(self._groups)
        after: Carry = []
        with torch.no_grad():
            for k, piece in enumerate(self.pieces if to_the_end else self.pieces[:-1]):
                entering, state = features, self._host.get(carry[k])
                self._host.fetch(carry[k + 1 : k + 2])
                features, new = piece(entering, state)
                after.append(self._host.put(new) if onward else None)
                if inputs is not None and k + 1 < len(self.pieces):
                    inputs.append(self._waiting(features, dict(zip(map(id, entering), inputs[-1], strict=True))))
                del entering, state, new
        self._check_buffers()
        return features[0], after

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

    def _check_buffers(self) -> None:
        if not self.repeats:
            return
        changed = next((name for name, x, version in self._buffers if x._version != version), None)
        if changed is not None:
            raise RuntimeError(
                f"The decoder's buffer '{changed}' changes whenever it decodes (spectral norm in training mode?), "
                "so that a step cannot be repeated: call vae.eval(), or use ordinary back-propagation, "
                "chopgrad.decode(..., Full())."
            )
