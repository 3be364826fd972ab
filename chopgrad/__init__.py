"""ChopGrad: pixel-wise losses for latent video diffusion, by truncated back-propagation through the video decoder."""

from chopgrad.decoders import DECODERS, CausalDecoder, FrameGroup, decoder_for
from chopgrad.loss import frame_loss, framewise
from chopgrad.strategies import Chop, Exact, Full, Strategy

__version__ = "0.1.0"
__all__ = [
    "DECODERS",
    "CausalDecoder",
    "Chop",
    "Exact",
    "FrameGroup",
    "Full",
    "Strategy",
    "decoder_for",
    "frame_loss",
    "framewise",
]
