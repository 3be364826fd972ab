"""AutoencoderKLLTX2Video: without spatial_compression_ratio and temporal_compression_ratio in its config it takes
itself to compress twice as much as it does (64 and 16), because it counts all four downsamplers, of which by default
one is in space and one in time alone.
Right: 32 and 8, which encode and decode have.
"""

import torch
from diffusers import AutoencoderKLLTX2Video

torch.manual_seed(0)
vae = AutoencoderKLLTX2Video(
    latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32)
)
with torch.no_grad():
    z = vae.encode(torch.randn(1, 3, 17, 64, 64)).latent_dist.mode()
assert vae.spatial_compression_ratio == 64 // z.shape[-1], vae.spatial_compression_ratio
assert vae.temporal_compression_ratio == 16 // (z.shape[2] - 1), vae.temporal_compression_ratio
