"""ChopGrad: pixel-wise losses for latent video diffusion, by truncated back-propagation through the video decoder."""

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
