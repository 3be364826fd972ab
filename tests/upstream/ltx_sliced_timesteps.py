"""AutoencoderKLLTXVideo: decode with slicing and timesteps fails, because the loop over (z.split(1), temb.split(1))
lacks a zip: of two videos the second is taken for a timestep, three cannot be unpacked.
Right: each video with its timestep.
"""

import torch
from diffusers import AutoencoderKLLTXVideo

torch.manual_seed(0)
vae = AutoencoderKLLTXVideo(latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4)
z, timesteps = torch.randn(3, 4, 1, 2, 2), torch.full((3,), 0.05)
with torch.no_grad():
    whole = vae.decode(z, timesteps).sample
    vae.enable_slicing()
    sliced = vae.decode(z, timesteps).sample
error = ((sliced - whole).norm() / whole.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
