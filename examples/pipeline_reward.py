"""A reward of the whole clip on a diffusers pipeline: ``python examples/pipeline_reward.py``.

One line is ours: ``chopgrad.patch(pipe.vae)``. The reward of a sampled video reaches the transformer through the VAE
and the last sampling step (DRaFT-1; Clark et al., ICLR 2024). It attends to all frames at once: how much the video
resembles another one. A tiny VAE and transformer stand in for ``--pretrained FOLDER``.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

import chopgrad
from suite.clips import load_clip, packaged_clip


class VideoEncoder(nn.Module):
    """[batch, 3, frames, H, W] in [0, 1] -> [batch, 64]: random, a stand-in for your frozen video encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 64, (3, 8, 8), (1, 8, 8), padding=(1, 0, 0))
        self.attention = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)

    def forward(self, video: Tensor) -> Tensor:
        return self.attention(self.patches(2 * video - 1).relu().mean((3, 4)).mT).mean(1)


def pipeline(pretrained: str | None) -> Any:
    no_text, dtypes = {"text_encoder": None, "tokenizer": None}, {"vae": torch.bfloat16, "default": torch.float32}
    if pretrained:
        return WanPipeline.from_pretrained(pretrained, torch_dtype=dtypes, **no_text)
    vae = AutoencoderKLWan.from_pretrained(Path(__file__).parents[1] / "weights" / "tiny-wan2.1")
    size: Any = {"num_attention_heads": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 256, "num_layers": 2}
    transformer = WanTransformer3DModel(in_channels=64, out_channels=64, attention_head_dim=32, **size)
    return WanPipeline(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **no_text)


def sample(pipe: Any, steps: int, frames: int, size: tuple[int, int]) -> Tensor:
    """A video [batch, 3, frames, H, W] in [0, 1], with the graph of the last of at least two sampling steps."""
    prompt = torch.zeros(1, 8, pipe.transformer.config.text_dim, device=pipe.device)  # pipe.encode_prompt(...)[0]

    def last_step_only(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.set_grad_enabled(i + 2 >= steps)  # a pipeline begins under no_grad, and restores what was before it
        return {}

    return pipe(
        prompt_embeds=prompt, num_inference_steps=steps, num_frames=frames, height=size[0], width=size[1],
        guidance_scale=1.0, output_type="pt", callback_on_step_end=last_step_only,
    ).frames.transpose(1, 2)  # fmt: skip


def main(
    pretrained: str | None = None, frames: int = 17, size: tuple[int, int] = (32, 32), sampling_steps: int = 4,
    steps: int = 10, lr: float = 2e-3, device: str = "cuda" if torch.cuda.is_available() else "cpu", seed: int = 0,
) -> None:  # fmt: skip
    """Raise the reward of sampled videos and print it at every step; size in multiples of 16 pixels."""
    torch.manual_seed(seed)
    pipe = pipeline(pretrained).to(device)
    pipe.vae.requires_grad_(False)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(disable=True)
    chopgrad.patch(pipe.vae)  # the one line
    encoder = VideoEncoder().to(device).eval().requires_grad_(False)
    wanted = encoder(load_clip(packaged_clip("bikes"), frames, *size)[None].to(device) / 2 + 0.5)
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr)
    for step in range(steps):
        reward = F.cosine_similarity(encoder(sample(pipe, sampling_steps, frames, size).float()), wanted).mean()
        (-reward).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} reward {reward.item():.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
