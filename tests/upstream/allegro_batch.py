"""AutoencoderKLAllegro: a batch of videos raises without enable_slicing(), because a tile of all of them is written
into a buffer for one; encode likewise.
Right: each video as it is decoded alone.
"""

import torch
from diffusers import AutoencoderKLAllegro

torch.manual_seed(0)
vae = AutoencoderKLAllegro(
    latent_channels=4, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2,
    down_block_types=("AllegroDownBlock3D",) * 3, up_block_types=("AllegroUpBlock3D",) * 3,
    temporal_downsample_blocks=(True, True, False), temporal_upsample_blocks=(False, True, True),
).eval()  # fmt: skip
vae.kernel, vae.stride = (24, 8, 8), (16, 4, 4)
vae.enable_tiling()
z = torch.randn(2, 4, 6, 2, 2)
with torch.no_grad():
    alone = torch.cat([vae.decode(video).sample for video in z.split(1)])
    together = vae.decode(z).sample
error = ((together - alone).norm() / alone.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
