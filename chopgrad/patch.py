"""``patch``: one line that makes ``vae.decode`` itself differentiable in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from chopgrad.decode import decode
from chopgrad.decoders import CausalDecoder, decoder_for
from chopgrad.decoders.own import PATCH, bare
from chopgrad.inputs import check_sampled
from chopgrad.strategies import RECOMMENDED, Strategy


@dataclass
class Patch:
    decoder: CausalDecoder
    strategy: Strategy


class PatchHandle:
    """Takes the patch off again: ``handle.remove()``, or leave the ``with`` block."""

    def __init__(self, vae: nn.Module, patched: Patch) -> None:
        self._vae, self._patch = vae, patched

    def remove(self) -> None:
        """Let ``vae.decode`` be the VAE's own again. More than once has no further effect."""
        if vars(self._vae).get(PATCH) is self._patch:
            del self._vae.__dict__[PATCH], self._vae.__dict__["decode"]

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def patch(vae: nn.Module, strategy: Strategy = RECOMMENDED, **settings: Any) -> PatchHandle:
    """Let ``vae.decode`` go through ``chopgrad.decode``: whatever calls it trains in bounded memory, with any loss.

    Pipelines, reward trainers and guidance loops need no other change. Latents are taken as ``vae.decode`` takes them;
    ``return_dict=False`` and ``enable_slicing()`` work as before, and so does decoding without gradients, which then
    takes the memory of one frame group.

    Args:
        vae: a model that ``chopgrad.decoder_for`` takes.
        strategy: see ``chopgrad.strategies``. Default: exact, in the least memory.
        settings: of ``chopgrad.decoder_for``: ``clamp``, ``checkpoint``, ``check``.

    Returns:
        A handle whose ``remove()`` undoes it; also a context manager.

    Raises:
        ValueError: the VAE is patched already, or ``decoder_for`` refuses it.
    """
    check_sampled(strategy)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be Full(), Chop(distance=...) or Exact(), got {strategy!r}.")
    model = bare(vae)
    if PATCH in vars(model):
        raise ValueError("vae.decode is patched already: call remove() on the handle of the first patch.")
    patched = Patch(decoder_for(model, **settings), strategy)
    # Kept on the VAE, and the method bound to it, so that a copy of the VAE decodes with its own weights.
    model.__dict__[PATCH] = patched
    model.__dict__["decode"] = MethodType(_decode, model)
    return PatchHandle(model, patched)


def _decode(self: Any, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    settings: Patch = vars(self)[PATCH]
    parts = z.split(1) if self.use_slicing and z.shape[0] > 1 else (z,)
    frames = torch.cat([decode(settings.decoder, part, settings.strategy) for part in parts])
    return DecoderOutput(sample=frames) if return_dict else (frames,)
