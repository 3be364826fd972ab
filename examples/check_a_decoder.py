"""The conformance kit on a right decoder and on one that forgets its cache: ``python examples/check_a_decoder.py``."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils._pytree import tree_map_only

from chopgrad.decoders import WanDecoder
from chopgrad.testing import ConformanceError, check_decoder


class ForgetsItsCache(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        return frames, tree_map_only(torch.Tensor, torch.zeros_like, state)


torch.manual_seed(0)
vae: Any = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
vae = vae.float().eval().requires_grad_(False)

print("holds:", ", ".join(check_decoder(WanDecoder(vae))))
try:
    check_decoder(ForgetsItsCache(vae))
except ConformanceError as error:
    print(f"ConformanceError: {error}")
