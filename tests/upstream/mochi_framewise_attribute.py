"""AutoencoderKLMochi: use_framewise_decoding = True, the attribute alone, gives wrong frames in silence: the cache of a
"replicate" convolution is always None, so that every two latents begin anew.
Right: the frames of all latents at once.
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
    vae.use_framewise_decoding = True
    framewise = vae.decode(z).sample
error = ((framewise - whole).norm() / whole.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
