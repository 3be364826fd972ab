"""AutoencoderKLAllegro: frames that no temporal tile covers are black, in silence: the last ones unless there are 6,
10, 14, ... latents, and all of fewer than 6. So are rows and columns that no spatial tile covers.
Right: a last tile that ends with the video, or a ValueError.
"""

import torch
from diffusers import AutoencoderKLAllegro

torch.manual_seed(0)
vae = AutoencoderKLAllegro(
    latent_channels=4, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2,
    down_block_types=("AllegroDownBlock3D",) * 3, up_block_types=("AllegroUpBlock3D",) * 3,
    temporal_downsample_blocks=(True, True, False), temporal_upsample_blocks=(False, True, True),
).eval()  # fmt: skip
vae.kernel, vae.stride = (24, 8, 8), (16, 4, 4)  # in time the published ones
vae.enable_tiling()
with torch.no_grad():
    frames = vae.decode(torch.randn(1, 4, 7, 2, 2)).sample
black = (frames == 0).all(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()
assert not black, f"black frames: {black}"
