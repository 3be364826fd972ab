"""Small random VAEs of every supported class, for tests of exactness."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLMagvit, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn


def _wan21() -> nn.Module:
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip


def _wan22() -> nn.Module:
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip


def _qwen() -> nn.Module:
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip


def _cogvideox() -> nn.Module:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip


def _magvit() -> nn.Module:
    return AutoencoderKLMagvit(
        block_out_channels=[4, 4, 8, 8], latent_channels=4, layers_per_block=1, norm_num_groups=2
    )  # fmt: skip


def _magvit_in_threes() -> nn.Module:
    """With norms over a whole group, interpolation in time, and three latents per group."""
    vae = AutoencoderKLMagvit(
        block_out_channels=[4, 8, 8], latent_channels=4, layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False, down_block_types=["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 2,
        up_block_types=["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 2,
    )  # fmt: skip
    vae.num_latent_frames_batch_size = 3
    return vae


def _kvae() -> nn.Module:
    # Its norms have 32 groups.
    return diffusers.AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4)


def _kandinsky6() -> nn.Module:
    return diffusers.Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(4, 4, 4, 8), decoder_block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
    )  # fmt: skip


VAES = {"wan2.1": _wan21, "wan2.2": _wan22, "qwen": _qwen, "cogvideox": _cogvideox}
MORE = {"magvit": _magvit, "magvit, three latents": _magvit_in_threes}
"""The other supported classes: ``tests/chopgrad/test_every_decoder.py`` runs over them."""
if hasattr(diffusers, "AutoencoderKLKVAEVideo"):
    MORE["kvae"] = _kvae
if hasattr(diffusers, "Kandinsky6SRVAE"):
    MORE["kandinsky6"] = _kandinsky6


class KeepDtypeUpsample(nn.Upsample):
    """Upstream's upsampler without its cast to float32, so that a float64 model is float64 throughout."""


class KeepDtypeRMSNorm(nn.Module):
    """Kandinsky 6's norm without its cast to float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=1) * self.scale * self.gamma


def twin(module: nn.Module, known: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy that may be changed like one of ``copy.deepcopy``, in a tenth of the time: what is no tensor, module or
    container is shared.
    """
    known = {} if known is None else known
    if id(module) not in known:
        known[id(module)] = other = object.__new__(type(module))
        vars(other).update(vars(module))
        for name, value in vars(module).items():
            if isinstance(value, dict | list | set):
                vars(other)[name] = copy.copy(value)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                other._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            other._buffers[name] = None if buffer is None else buffer.clone()
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else twin(child, known)
    return known[id(module)]


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random VAE, frozen; norms and biases are randomised too, so that no term is silently zero.

    The random state is afterwards what the seed makes it.
    """
    vae, state = _built(name, dtype, seed)
    torch.manual_seed(seed)  # of every device
    torch.set_rng_state(state)
    return twin(vae)


@cache
def _built(name: str, dtype: torch.dtype, seed: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    vae = (VAES | MORE)[name]()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    vae = vae.to(dtype).eval().requires_grad_(False)
    for module in vae.modules():
        if dtype == torch.float64 and type(module).__name__ in ("WanUpsample", "QwenImageUpsample"):
            module.__class__ = KeepDtypeUpsample
        if dtype == torch.float64 and type(module).__name__ == "Kandinsky6VAERMSNorm":
            module.__class__ = KeepDtypeRMSNorm
    return vae, torch.get_rng_state()


def latents_for(vae: nn.Module, latent_frames: int, batch: int = 1, size: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = next(vae.parameters())
    shape = (batch, 4, latent_frames, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype)
