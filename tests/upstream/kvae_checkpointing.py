"""AutoencoderKLKVAEVideo: with gradient checkpointing the gradient is wrong, in silence: blocks change dicts of caches
in place, so that the recomputation reads what the first run wrote. (One latent raises a RuntimeError.)
Right: the gradient without checkpointing.
"""

import torch
from diffusers import AutoencoderKLKVAEVideo

torch.manual_seed(0)
vae = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4).double()
z = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
(plain,) = torch.autograd.grad(vae.decode(z).sample.square().mean(), z)
vae.enable_gradient_checkpointing()
(checkpointed,) = torch.autograd.grad(vae.decode(z).sample.square().mean(), z)
error = ((checkpointed - plain).norm() / plain.norm()).item()
assert error < 1e-9, f"relative error {error:.2f}"
