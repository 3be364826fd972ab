"""Small random VAEs of every supported class, for tests of exactness."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLMagvit, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.tiny_video_vae import TinyVideoVAE


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


def _hunyuan_video() -> nn.Module:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 8
    return vae


def _ltx(name: str = "AutoencoderKLLTXVideo", **settings: object) -> nn.Module:
    vae = getattr(diffusers, name)(
        latent_channels=4, block_out_channels=(4, 4, 8), layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1, 1, 2, 1), decoder_inject_noise=(False,) * 4, **settings,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 2.0, 0.5, 1.0]))
    vae.use_framewise_decoding = True
    return vae


def _ltx1() -> nn.Module:
    vae = _ltx(
        down_block_types=("LTXVideoDownBlock3D",) * 3, spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False), upsample_residual=(False, True, False),
        upsample_factor=(1, 2, 1), downsample_type=("conv",) * 3, decoder_block_out_channels=(4, 8, 8), patch_size=2,
    )  # fmt: skip
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 4  # three tiles overlap
    return vae


def _ltx2() -> nn.Module:
    return _ltx(
        "AutoencoderKLLTX2Video", down_block_types=("LTX2VideoDownBlock3D",) * 3, spatio_temporal_scaling=(True,) * 3,
        decoder_spatio_temporal_scaling=(True,) * 3, upsample_residual=(False, True, True), upsample_factor=(2,) * 3,
        downsample_type=("spatiotemporal",) * 3, upsample_type=("spatiotemporal",) * 3, decoder_causal=False,
        decoder_block_out_channels=(4, 8, 16), patch_size=1,
    )  # fmt: skip


def _minimax_h3() -> nn.Module:
    return diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4, block_out_channels=(4, 4, 4), layers_per_block=1, spatial_downsample_factors=(2, 2, 2),
        temporal_downsample_factors=(1, 2, 2), norm_num_groups=2, decoder_num_layers=2, decoder_num_attention_heads=2,
        decoder_attention_head_dim=8, decoder_num_register_tokens=2, decoder_ffn_mult=2, clip_length=9, token_drop=1,
        latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 2.0, 0.5, 1.0),
    )  # fmt: skip


def _allegro() -> nn.Module:
    vae = diffusers.AutoencoderKLAllegro(
        latent_channels=4, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("AllegroDownBlock3D",) * 3, up_block_types=("AllegroUpBlock3D",) * 3,
        temporal_downsample_blocks=(True, True, False), temporal_upsample_blocks=(False, True, True),
    )  # fmt: skip
    vae.kernel, vae.stride = (12, 8, 8), (8, 4, 4)
    vae.enable_tiling()
    return vae


def _mochi() -> nn.Module:
    # Its norms have 32 groups.
    return diffusers.AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 3, decoder_block_out_channels=(32,) * 3,
        layers_per_block=(1,) * 4, add_attention_block=(False,) * 4, temporal_expansions=(1, 2),
        spatial_expansions=(1, 2), latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
        scaling_factor=1.3,
    )  # fmt: skip


def _taehv() -> nn.Module:
    return TinyVideoVAE()


def _vidtok() -> nn.Module:
    return diffusers.AutoencoderVidTok(
        ch=4, ch_mult=[1, 2, 2], num_res_blocks=0, z_channels=4, spatial_ds=[0, 1], spatial_us=[1, 2], tempo_ds=[0, 1],
        tempo_us=[1, 2],
    )  # fmt: skip


VAES = {"wan2.1": _wan21, "wan2.2": _wan22, "qwen": _qwen, "cogvideox": _cogvideox}
QWEN_SLOWLY = [*(name for name in VAES if name != "qwen"), pytest.param("qwen", marks=pytest.mark.slow)]
"""For tests that take long: Qwen-Image's VAE is that of Wan 2.1 in another class; quicker tests run both."""
MORE = {"magvit": _magvit, "magvit, three latents": _magvit_in_threes}
"""The other supported classes: ``tests/chopgrad/test_every_decoder.py`` runs over them."""
if hasattr(diffusers, "AutoencoderKLKVAEVideo"):
    MORE["kvae"] = _kvae
if hasattr(diffusers, "Kandinsky6SRVAE"):
    MORE["kandinsky6"] = _kandinsky6
MORE |= {"allegro": _allegro, "hunyuan video": _hunyuan_video, "ltx": _ltx1}
if hasattr(diffusers, "AutoencoderKLLTX2Video"):
    MORE["ltx2"] = _ltx2
if hasattr(diffusers, "AutoencoderKLMiniMaxH3"):
    MORE["minimax h3"] = _minimax_h3
MORE |= {"mochi": _mochi, "taehv": _taehv}
if hasattr(diffusers, "AutoencoderVidTok"):
    MORE["vidtok"] = _vidtok


class KeepDtypeUpsample(nn.Upsample):
    """Upstream's upsampler without its cast to float32, so that a float64 model is float64 throughout."""


class KeepFloat64(TorchFunctionMode):
    """Casts to float32 have no effect."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,)):
            return args[0]
        return func(*args, **(kwargs or {}))


@cache
def keeping_float64(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of modules without the casts to float32 in its forward."""

    def forward(self, *args, **kwargs):
        with KeepFloat64():
            return cls.forward(self, *args, **kwargs)

    return type(f"KeepFloat64{cls.__name__}", (cls,), {"forward": forward})


class KeepDtypeRMSNorm(nn.Module):
    """Kandinsky 6's norm without its cast to float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=1) * self.scale * self.gamma


class KeepDtypeVidTokInSpace(nn.Module):
    """VidTok's upsampler in space without its cast to float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class KeepDtypeVidTokInTime(nn.Module):
    """VidTok's upsampler in time without its cast to float32, as a decode without tiles uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.tensor_split([self.num_temp_upsample], dim=2)
        parts = [nn.functional.interpolate(y, scale_factor=(2, 1, 1), mode="trilinear") for y in parts if y.numel()]
        x, alpha = torch.cat(parts, dim=2), self.mix_factor.sigmoid()
        return alpha * x + (1 - alpha) * self.conv(x)


KEEP_DTYPE = {
    "QwenImage21Upsample": KeepDtypeUpsample,
    "VidTokUpsample2D": KeepDtypeVidTokInSpace,
    "VidTokUpsample3D": KeepDtypeVidTokInTime,
}
"""What takes the place of upstream's class, by its name."""


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
        if dtype == torch.float64 and type(module).__name__ in ("RMSNorm", "MiniMaxH3VideoTransformerBlock"):
            module.__class__ = keeping_float64(type(module))
        if dtype == torch.float64:
            module.__class__ = KEEP_DTYPE.get(type(module).__name__, type(module))
        if dtype == torch.float64 and type(module).__name__ == "Kandinsky6VAERMSNorm":
            module.__class__ = KeepDtypeRMSNorm
    return vae, torch.get_rng_state()


def latents_for(vae: nn.Module, latent_frames: int, batch: int = 1, size: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = next(vae.parameters())
    shape = (batch, 4, latent_frames, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype)
