"""A reward's gradient into a video transformer: ``python examples/reward_gradient.py``.

DRaFT-1 (Clark et al., ICLR 2024): the reward of all frames of a sampled video, differentiated through the last sampling
step. The reward is any module that scores images. A tiny VAE and transformer stand in for ``--pretrained FOLDER``.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from chopgrad import Exact, decoder_for, frame_loss, framewise

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
    # With the clamp: a pixel beyond [-1, 1] must earn nothing.
    decoder = decoder_for(vae.eval().requires_grad_(False), checkpoint="frame")
    reward = warmth  # your reward model, on the device, in eval mode and frozen
    optimizer = torch.optim.AdamW(transformer.parameters(), lr)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    prompt = torch.zeros(1, 8, transformer.config.text_dim, device=device)  # your text encoder's output
    size = [n * vae.config.scale_factor_spatial for n in latent_size]

    def negative_reward(frames: Tensor, _: Tensor) -> Tensor:
        return -reward(frames.transpose(1, 2).flatten(0, 1)).mean()

    def no_target(frames: slice) -> Tensor:  # a reward compares with nothing: a view of one zero stands in
        return torch.zeros(()).expand(1, 3, frames.stop - frames.start, *size)

    for step in range(steps):
        scheduler.set_timesteps(sampling_steps, device=device)
        x = torch.randn(1, vae.config.z_dim, latent_frames, *latent_size, device=device)
        for k, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(k == sampling_steps - 1):
                velocity = transformer(x, t.expand(1), prompt, return_dict=False)[0]
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
        latents = decoder.denormalize(x.to(vae.dtype))
        loss = frame_loss(decoder, latents, no_target, framewise(negative_reward), Exact(offload=True, pieces=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} reward {-loss.item():.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
