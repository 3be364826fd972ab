"""ChopGrad: pixel-wise losses for latent video diffusion, by truncated back-propagation through the video decoder."""

from chopgrad.adaptive import Adaptive
from chopgrad.decoders import DECODERS, CausalDecoder, FrameGroup, decoder_for
from chopgrad.loss import frame_loss, framewise
from chopgrad.strategies import Chop, Exact, Full, Sampled, Strategy

__version__ = "0.1.0"
__all__ = [
    "DECODERS",
    "Adaptive",
    "CausalDecoder",
    "Chop",
    "Exact",
    "FrameGroup",
    "Full",
    "Sampled",
    "Strategy",
    "decoder_for",
    "frame_loss",
    "framewise",
]
