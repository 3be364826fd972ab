"""AutoencoderKLKVAEVideo: a last segment of one latent (of 6, 10, 14, ...) decodes to one frame in place of four, in
silence. KVAECachedPXSUpsample.temporal_upsample takes it for an image, wherever in the video it is.
Right: as many frames as were encoded, here 21.
"""

import torch
from diffusers import AutoencoderKLKVAEVideo

torch.manual_seed(0)
vae = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)
with torch.no_grad():
    z = vae.encode(torch.randn(1, 3, 21, 8, 8)).latent_dist.mode()
    frames = vae.decode(z).sample.shape[2]
assert z.shape[2] == 6
assert frames == 21, f"{frames} frames, not 21"
