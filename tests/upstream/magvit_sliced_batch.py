"""AutoencoderKLMagvit: decode of a batch with slicing raises. It clears the convolutions' caches after the last video
only, so that the second begins with those of the first, and torch.cat gets 9 and 12 frames.
Right: each video as it is decoded alone.
"""

import torch
from diffusers import AutoencoderKLMagvit

torch.manual_seed(0)
vae = AutoencoderKLMagvit(block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
z = torch.randn(2, 4, 3, 2, 2)
with torch.no_grad():
    alone = torch.cat([vae.decode(video).sample for video in z.split(1)])
    vae.enable_slicing()
    sliced = vae.decode(z).sample
error = ((sliced - alone).norm() / alone.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
