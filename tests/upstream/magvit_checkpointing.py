"""AutoencoderKLMagvit: gradient checkpointing raises CheckpointError for more than one latent, because the
recomputation reads the caches on the modules, which have gone on since.
Right: the gradient without checkpointing.
"""

import torch
from diffusers import AutoencoderKLMagvit

torch.manual_seed(0)
vae = AutoencoderKLMagvit(block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
z = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
(plain,) = torch.autograd.grad(vae.decode(z).sample.square().mean(), z)
vae.enable_gradient_checkpointing()
(checkpointed,) = torch.autograd.grad(vae.decode(z).sample.square().mean(), z)
error = ((checkpointed - plain).norm() / plain.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
