"""AutoencoderVidTok: decode(indices, decode_from_indices=True) raises unless the weights are in float32, because
indices_to_codes divides integers, which gives float32.
Right: codes in the dtype of the weights.
"""

import torch
from diffusers import AutoencoderVidTok

torch.manual_seed(0)
vae = AutoencoderVidTok(
    ch=4, ch_mult=[1, 2, 2], num_res_blocks=0, z_channels=4, spatial_ds=[0, 1], spatial_us=[1, 2], tempo_ds=[0, 1],
    tempo_us=[1, 2], regularizer="fsq", double_z=False, codebook_size=8**4,
).to(torch.bfloat16)  # fmt: skip
indices = torch.randint(8**4, (1, 3, 2, 2))
with torch.no_grad():
    frames = vae.decode(indices, decode_from_indices=True)
assert frames.dtype == torch.bfloat16
