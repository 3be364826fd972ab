"""AutoencoderKLMochi: after _enable_framewise_decoding() decode raises. That sets pad_mode to "constant" on
convolutions made for "replicate", which have no padding of their own, so that nothing pads them in space.
Right: the frames of all latents at once; every convolution is causal, so that a cache can give them.
"""

import torch
from diffusers import AutoencoderKLMochi

torch.manual_seed(0)
vae = AutoencoderKLMochi(
    latent_channels=4, encoder_block_out_channels=(32,) * 3, decoder_block_out_channels=(32,) * 3,
    layers_per_block=(1,) * 4, add_attention_block=(False,) * 4, temporal_expansions=(1, 2), spatial_expansions=(1, 2),
)  # fmt: skip
z = torch.randn(1, 4, 3, 2, 2)
with torch.no_grad():
    whole = vae.decode(z).sample
    vae._enable_framewise_decoding()
    framewise = vae.decode(z).sample
error = ((framewise - whole).norm() / whole.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
