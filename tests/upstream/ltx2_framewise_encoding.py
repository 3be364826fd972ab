"""AutoencoderKLLTX2Video: _encode asks use_framewise_decoding where it means use_framewise_encoding: temporal tiles for
the decoder change the latents that encode gives, in silence, and the switch for encode does nothing.
Right: latents depend on use_framewise_encoding alone.
"""

import torch
from diffusers import AutoencoderKLLTX2Video

torch.manual_seed(0)
vae = AutoencoderKLLTX2Video(
    latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
    spatial_compression_ratio=32, temporal_compression_ratio=8,
)  # fmt: skip
video = torch.randn(1, 3, 25, 64, 64)
with torch.no_grad():
    before = vae.encode(video).latent_dist.mode()
    vae.use_framewise_decoding = True
    after = vae.encode(video).latent_dist.mode()
error = ((after - before).norm() / before.norm()).item()
assert error < 1e-4, f"relative difference {error:.2f}"
