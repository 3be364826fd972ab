"""AutoencoderKLMagvit: after an exception inside decode (out of memory, an interrupt) the caches stay on the modules,
and the next decode goes on where the failed one ended: three latents give 12 frames, in silence.
Right: 9 frames, as before; decode should clear its caches at its start, or in a finally.
"""

import torch
from diffusers import AutoencoderKLMagvit

torch.manual_seed(0)
vae = AutoencoderKLMagvit(block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
z = torch.randn(1, 4, 3, 2, 2)
with torch.no_grad():
    before = vae.decode(z).sample
    interrupt = vae.decoder.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        vae.decode(z)
    except ZeroDivisionError:
        interrupt.remove()
    after = vae.decode(z).sample
assert after.shape == before.shape, f"{after.shape[2]} frames, not {before.shape[2]}"
error = ((after - before).norm() / before.norm()).item()
assert error < 1e-4, f"relative error {error:.2f}"
