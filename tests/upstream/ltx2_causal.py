"""AutoencoderKLLTX2Video: decode(z, causal=False) of a causal decoder stays causal, in silence, and so does encode:
"causal or self.is_causal" reads False as not given.
Right: what the same weights give with is_causal = False.
"""

import torch
from diffusers import AutoencoderKLLTX2Video

torch.manual_seed(0)
vae = AutoencoderKLLTX2Video(
    latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
    spatial_compression_ratio=32, temporal_compression_ratio=8, decoder_causal=True,
)  # fmt: skip
z = torch.randn(1, 4, 3, 2, 2)
with torch.no_grad():
    asked = vae.decode(z, causal=False).sample
    vae.decoder.is_causal = False
    right = vae.decode(z).sample
error = ((asked - right).norm() / right.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
