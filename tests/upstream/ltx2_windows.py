"""AutoencoderKLLTX2Video with use_framewise_decoding: of each later temporal tile the last frame is dropped where the
first is meant ([:, :, :-1] for [:, :, 1:], as HunyuanVideo has it): later frames come one too late, blends mix frames
that are one apart, and the last frame never comes.
Right: frames 0, 1, 2, ... of a decoder that gives their numbers.
"""

import torch
from diffusers import AutoencoderKLLTX2Video


class Numbers(torch.nn.Module):
    def forward(self, z, *args, **kwargs):
        steps = torch.arange((z.shape[2] - 1) * 8 + 1.0).view(1, 1, -1, 1, 1)
        return (z[:, :1, :1, :1, :1] + steps).expand(-1, 3, -1, 64, 64).clone()


vae = AutoencoderKLLTX2Video(
    latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
    spatial_compression_ratio=32, temporal_compression_ratio=8,
)  # fmt: skip
vae.use_framewise_decoding = True
vae.decoder = Numbers()  # a latent holds the number of its first frame
z = (8.0 * torch.arange(6)).view(1, 1, -1, 1, 1).expand(1, 4, -1, 2, 2)
frames = vae.decode(z).sample[0, 0, :, 0, 0].tolist()
assert frames == list(range(41)), frames
