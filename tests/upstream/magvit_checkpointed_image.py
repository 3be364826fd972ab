"""AutoencoderKLMagvit: with gradient checkpointing and one latent the gradient is right, but the recomputation in the
backward pass fills the caches again, and nothing clears them: the next decode is wrong, in silence.
Right: the frame that the same latent gave before; nothing stays on the modules.
"""

import torch
from diffusers import AutoencoderKLMagvit

torch.manual_seed(0)
vae = AutoencoderKLMagvit(block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
z, other = torch.randn(2, 1, 4, 1, 2, 2)
before = vae.decode(other).sample
vae.enable_gradient_checkpointing()
vae.decode(z.requires_grad_()).sample.square().mean().backward()
after = vae.decode(other).sample
error = ((after - before).norm() / before.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
