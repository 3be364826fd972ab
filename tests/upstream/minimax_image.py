"""AutoencoderKLMiniMaxH3: encode makes one latent of an image, and decode of one latent raises: one or two are fewer
than token_drop and a chunk need, no chunk is decoded, and an empty list is concatenated.
Right: frames; at least one chunk is decoded.
"""

import torch
from diffusers import AutoencoderKLMiniMaxH3

torch.manual_seed(0)
vae = AutoencoderKLMiniMaxH3(
    latent_channels=4, block_out_channels=(4, 4, 4), layers_per_block=1, spatial_downsample_factors=(2, 2, 2),
    temporal_downsample_factors=(1, 2, 2), norm_num_groups=2, decoder_num_layers=1, decoder_num_attention_heads=2,
    decoder_attention_head_dim=8, decoder_num_register_tokens=2, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
)  # fmt: skip
with torch.no_grad():
    z = vae.encode(torch.randn(1, 3, 1, 16, 16)).latent_dist.mode()
    frames = vae.decode(z).sample
assert frames.shape[2] > 0
