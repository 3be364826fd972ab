"""AutoencoderKLLTX2Video: with enable_tiling() decode raises where the last tile is one latent wide (29 latents, 928
pixels, at the default sizes; here 5), because the decoder's default padding, "reflect", needs two.
Right: a video, 160 pixels wide.
"""

import torch
from diffusers import AutoencoderKLLTX2Video

torch.manual_seed(0)
vae = AutoencoderKLLTX2Video(
    latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
    spatial_compression_ratio=32, temporal_compression_ratio=8,
)  # fmt: skip
vae.enable_tiling(96, 96, tile_sample_stride_height=64, tile_sample_stride_width=64)  # 3 latents, 2 apart
with torch.no_grad():
    frames = vae.decode(torch.randn(1, 4, 1, 2, 5)).sample
assert frames.shape == (1, 3, 1, 64, 160)
