"""ChopGrad: pixel-wise losses for latent video diffusion, by truncated back-propagation through the video decoder.

Names are imported when they are first used (PEP 562), so that ``chopgrad --help`` need not wait for PyTorch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chopgrad.decode import decode
    from chopgrad.decoders import DECODERS, CausalDecoder, FrameGroup, decoder_for, register_decoder
    from chopgrad.encode import encode
    from chopgrad.encoders import ENCODERS, CausalEncoder, LatentGroup, encoder_for, register_encoder
    from chopgrad.loss import frame_loss, framewise
    from chopgrad.patch import PatchHandle, patch
    from chopgrad.strategies import Chop, Exact, Full, Sampled, Strategy

__version__ = "0.1.0"
__all__ = [
    "DECODERS",
    "ENCODERS",
    "CausalDecoder",
    "CausalEncoder",
    "Chop",
    "Exact",
    "FrameGroup",
    "Full",
    "LatentGroup",
    "PatchHandle",
    "Sampled",
    "Strategy",
    "decode",
    "decoder_for",
    "encode",
    "encoder_for",
    "frame_loss",
    "framewise",
    "patch",
    "register_decoder",
    "register_encoder",
]

_NAMES = {
    "decode": ["decode"],
    "decoders": ["DECODERS", "CausalDecoder", "FrameGroup", "decoder_for", "register_decoder"],
    "encode": ["encode"],
    "encoders": ["ENCODERS", "CausalEncoder", "LatentGroup", "encoder_for", "register_encoder"],
    "loss": ["frame_loss", "framewise"],
    "patch": ["PatchHandle", "patch"],
    "strategies": ["Chop", "Exact", "Full", "Sampled", "Strategy"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chopgrad' has no attribute '{name}'")
    value = getattr(import_module(f"chopgrad.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Where a function and its module have one name (decode, encode, patch) it is the function's."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:  # Python binds a submodule when it has imported it
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
