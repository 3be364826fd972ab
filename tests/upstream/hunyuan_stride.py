"""AutoencoderKLHunyuanVideo, and LTX-Video and LTX-2: a temporal stride that is no multiple of the compression of time
is taken, and frames repeat in silence: tiles lie 10 // 4 latents apart, 8 frames, but 10 frames of each are kept.
Right: frames 0, 1, 2, ... of a decoder that gives their numbers; or a ValueError.
"""

import torch
from diffusers import AutoencoderKLHunyuanVideo


class Numbers(torch.nn.Module):
    def forward(self, z):
        steps = torch.arange((z.shape[2] - 1) * 4 + 1.0).view(1, 1, -1, 1, 1)
        return (z[:, :1, :1, :1, :1] + steps).expand(-1, 3, -1, 16, 16).clone()


vae = AutoencoderKLHunyuanVideo(
    latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
)
vae.post_quant_conv, vae.decoder = torch.nn.Identity(), Numbers()  # a latent holds the number of its first frame
vae.enable_tiling(tile_sample_stride_num_frames=10)
z = (4.0 * torch.arange(9)).view(1, 1, -1, 1, 1).expand(1, 4, -1, 2, 2)
frames = vae.decode(z).sample[0, 0, :, 0, 0].tolist()
assert frames == list(range(33)), frames
