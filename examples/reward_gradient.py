"""A reward's gradient into a video transformer: ``python examples/reward_gradient.py``.

DRaFT-1 (Clark et al., ICLR 2024): the reward of all frames of a sampled video, differentiated through the last sampling
step. The reward scores images, so it is streamed: frames exist for one frame group at a time, its own graph for one
frame. For a reward of the whole clip see pipeline_reward.py. A tiny VAE and transformer stand in for ``--pretrained
FOLDER``.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from chopgrad import decoder_for, frame_loss, framewise

TINY_VAE = Path(__file__).parents[1] / "weights" / "tiny-wan2.1"


def warmth(images: Tensor) -> Tensor:
    """Red minus blue, a stand-in for a learned reward such as an aesthetic score: [images, 3, H, W] -> [images]."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def models(pretrained: str | None) -> tuple[Any, Any]:
    if pretrained:
        vae = AutoencoderKLWan.from_pretrained(pretrained, subfolder="vae", torch_dtype=torch.bfloat16)
        return vae, WanTransformer3DModel.from_pretrained(pretrained, subfolder="transformer")
    vae = AutoencoderKLWan.from_pretrained(TINY_VAE)
    return vae, WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=vae.config.z_dim, out_channels=vae.config.z_dim,
        text_dim=16, freq_dim=32, ffn_dim=256, num_layers=2,
    )  # fmt: skip


def main(
    pretrained: str | None = None,
    latent_frames: int = 5,
    latent_size: tuple[int, int] = (8, 8),
    sampling_steps: int = 4,
    steps: int = 10,
    lr: float = 1e-3,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Raise the reward of sampled videos and print it at every step (21 latent frames are 81 frames)."""
    torch.manual_seed(seed)
    vae, transformer = (model.to(device) for model in models(pretrained))
    transformer.enable_gradient_checkpointing()
    decoder = decoder_for(vae.eval().requires_grad_(False))
    reward = warmth  # your reward model, on the device, in eval mode and frozen
    optimizer = torch.optim.AdamW(transformer.parameters(), lr)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    prompt = torch.zeros(1, 8, transformer.config.text_dim, device=device)  # your text encoder's output

    def negative_reward(frames: Tensor, target: None) -> Tensor:
        return -reward(frames.transpose(1, 2).flatten(0, 1)).mean()

    for step in range(steps):
        scheduler.set_timesteps(sampling_steps, device=device)
        x = torch.randn(1, vae.config.z_dim, latent_frames, *latent_size, device=device)
        for k, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(k == sampling_steps - 1):
                velocity = transformer(x, t.expand(1), prompt, return_dict=False)[0]
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
        latents = decoder.denormalize(x.to(vae.dtype))
        loss = frame_loss(decoder, latents, None, framewise(negative_reward))  # a reward compares with nothing
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} reward {-loss.item():.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
