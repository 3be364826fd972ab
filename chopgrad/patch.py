"""``patch``: one line that makes ``vae.decode`` itself differentiable in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from chopgrad.decode import decode
from chopgrad.decoders import CausalDecoder, decoder_for
from chopgrad.inputs import check_sampled
from chopgrad.own import bare
from chopgrad.recurrence import is_patched
from chopgrad.strategies import RECOMMENDED, Strategy


@dataclass
class Patch:
    """What stands in place of ``vae.decode``; it finds the VAE by its decoder, so that a copy decodes as itself."""

    decoder: CausalDecoder
    strategy: Strategy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decoder.answer(lambda z: decode(self.decoder, z, self.strategy), *args, **kwargs)


class PatchHandle:
    """Takes the patch off again: ``handle.remove()``, or leave the ``with`` block."""

    def __init__(self, vae: nn.Module, patched: Patch) -> None:
        self._attributes, self._patch = vars(vae), patched
        self._before = self._attributes.get("decode")
        self._attributes["decode"] = patched

    def remove(self) -> None:
        """Let ``vae.decode`` be what it was. More than once has no further effect."""
        if self._attributes.get("decode") is self._patch:
            del self._attributes["decode"]
            if self._before is not None:
                self._attributes["decode"] = self._before

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
        strategy: see ``chopgrad.strategies``. Default: exact, as fast as the memory that is free allows.
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
    if is_patched(model):
        raise ValueError(
            "vae.decode is patched already: call remove() on the handle of the first patch (of a copy: del vae.decode)."
        )
    decoder = decoder_for(model, **settings)
    if not callable(getattr(type(model), "decode", None)):
        raise ValueError(
            f"{type(model).__name__} has no decode to stand in for: call chopgrad.decode(chopgrad.decoder_for(vae), "
            "latents) in place of its own method."
        )
    return PatchHandle(model, Patch(decoder, strategy))
