"""AutoencoderVidTok: with enable_tiling() frames after the first are wrong, also of a video smaller than a tile. At the
second upsampling in time the first chunk keeps the last frames of the latent that it looks ahead at; the first of them,
repeated, would do.
Right: the frames without tiles. The chunks have caches and look ahead, so that they can be the same.
"""

import torch
from diffusers import AutoencoderVidTok

torch.manual_seed(0)
vae = AutoencoderVidTok(
    ch=4, ch_mult=[1, 2, 2], num_res_blocks=0, z_channels=4, spatial_ds=[0, 1], spatial_us=[1, 2], tempo_ds=[0, 1],
    tempo_us=[1, 2],
)  # fmt: skip
z = torch.randn(1, 4, 9, 2, 2)
with torch.no_grad():
    whole = vae.decode(z)
    vae.enable_tiling()
    tiled = vae.decode(z)
error = (tiled - whole).abs().amax((0, 1, 3, 4)) / whole.abs().max()
assert error.max() < 1e-4, f"relative errors of frames: {[round(e, 4) for e in error.tolist()]}"
