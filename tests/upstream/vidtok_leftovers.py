"""AutoencoderVidTok: decode leaves the whole input of every causal convolution on it (causal_cache), with its graph
where gradients are on, until the next decode.
Right: no module holds a tensor afterwards.
"""

import torch
from diffusers import AutoencoderVidTok

torch.manual_seed(0)
vae = AutoencoderVidTok(
    ch=4, ch_mult=[1, 2, 2], num_res_blocks=0, z_channels=4, spatial_ds=[0, 1], spatial_us=[1, 2], tempo_ds=[0, 1],
    tempo_us=[1, 2],
)  # fmt: skip
vae.decode(torch.randn(1, 4, 3, 2, 2, requires_grad=True))
left = [name for name, module in vae.named_modules() if getattr(module, "causal_cache", None) is not None]
assert not left, f"{len(left)} modules hold tensors, such as {left[0]}"
