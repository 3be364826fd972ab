"""A case made ready to run."""

from __future__ import annotations

import json
import warnings
from typing import Any

import diffusers
import torch
from torch import Tensor

import chopgrad
from bench.baselines import Baseline, differentiate
from bench.cases import FULL_SIZE, Case, Inside, Method, Whole
from chopgrad import CausalDecoder
from chopgrad.planner import ARCHITECTURES
from suite.losses import loss_by_name
from suite.vaes import EMBEDDED, load_vae


class Subject:
    """Decoder, latents, target and loss on the device.

    Latents and target are random; they cost the same as real ones. ``show`` puts a real video in their place. On the
    device ``meta`` (under ``chopgrad.shapes``) everything has a shape and no data.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        self.dtype = getattr(torch, case.dtype)
        if self.dtype is torch.float32:  # and not TensorFloat-32, whose rounding is as large as the errors looked for
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.decoder = _decoder(case.vae, case.device, self.dtype)
        if case.trainable_decoder:
            warnings.filterwarnings("ignore", message=r"\d+ parameters of the decoder")  # here they are meant
            self.decoder.vae.decoder.requires_grad_(True)
        self.latents = _latents(self.decoder, case).to(case.device, self.dtype)
        shape = (1, 3, case.frames, case.height, case.width)
        # The target stays on the host; the loss fetches it part by part.
        self.target = (torch.rand(shape, device="cpu") * 2 - 1).to(self.dtype)
        loss_fn = loss_by_name(case.loss, case.device, self.dtype)
        # A perceptual loss keeps more than the decoder, unless it goes frame by frame.
        self.loss_fn = loss_fn if case.loss in ("mse", "l1") else chopgrad.framewise(loss_fn)

    def show(self, video: Tensor) -> None:
        """Encode [1, 3, frames, H, W] in [-1, 1]; its latents and itself become latents and target."""
        self.target = video.to(self.dtype)
        with torch.no_grad():
            latents = self.decoder.vae.encode(self.target.to(self.case.device)).latent_dist.mode()
        if latents.shape != self.latents.shape:
            raise ValueError(f"The video encodes to {list(latents.shape)}, expected {list(self.latents.shape)}.")
        self.latents = latents

    def run(self, method: Method | None = None) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the latents): the work that is measured."""
        method = method or self.case.strategy
        leaf = self.latents.detach().clone().requires_grad_()
        parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        if isinstance(method, Baseline):
            loss, (gradient, *_) = differentiate(method, self.decoder, leaf, self.target, self.loss_fn, parameters)
            return loss, gradient
        decoder = self.decoder
        if isinstance(method, Inside):
            # Not checked again, which would be timed.
            decoder = chopgrad.decoder_for(decoder.vae, checkpoint=method.checkpoint, check=False)
            method = method.strategy
        if isinstance(method, Whole):
            # Both are held meanwhile, as a training step holds them.
            frames, target = chopgrad.decode(decoder, leaf, method.strategy), self._part(slice(None))
            loss = self.loss_fn(frames, target).clone()  # mse_loss on a CPU returns a scalar in a video's storage
        else:
            loss = chopgrad.frame_loss(decoder, leaf, self._part, self.loss_fn, method)
        gradient, *_ = torch.autograd.grad(loss, [leaf, *parameters])
        return loss.detach(), gradient

    def chosen(self) -> dict[str, list[str]]:
        """For a record: the forms that ``Exact()`` took."""
        found = [str(choice.form) for choice in self.decoder.chosen.values()]
        return {"chosen": found} if found else {}

    def _part(self, frames: slice) -> Tensor:
        # A copy, as a device would hold one, so that a CPU counts what a GPU counts.
        return self.target[:, :, frames].clone()


def build(vae: str, dtype: torch.dtype) -> Any:
    """The architecture with random weights, on the default device.

    Built in its dtype, not cast to it afterwards.
    """
    if vae in FULL_SIZE:
        name, config = ARCHITECTURES[FULL_SIZE[vae]]
    else:
        config = json.loads((EMBEDDED[vae] / "config.json").read_text())
        name = config["_class_name"]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(diffusers, name).from_config(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)


def _decoder(vae: str, device: str, dtype: torch.dtype) -> CausalDecoder:
    """It recomputes nothing, whatever the strategy: that is the method ``Inside``."""
    if vae not in EMBEDDED and vae not in FULL_SIZE:
        raise ValueError(f"Unknown VAE '{vae}': pass one of {', '.join([*EMBEDDED, *FULL_SIZE])}.")
    if vae in EMBEDDED and device != "meta":
        return chopgrad.decoder_for(load_vae(vae, device, dtype), checkpoint=None)
    with torch.device(device):
        return chopgrad.decoder_for(build(vae, dtype), checkpoint=None)


def _latents(decoder: CausalDecoder, case: Case) -> Tensor:
    count = next((n for n in range(1, case.frames + 1) if decoder.frame_count(n) >= case.frames), 1)
    weight = next(decoder.parameters())
    with torch.no_grad():
        factor = decoder.decode(weight.new_zeros(1, decoder.latent_channels, 1, 2, 2)).shape[-1] // 2
    if decoder.frame_count(count) != case.frames or case.height % factor or case.width % factor:
        raise ValueError(
            f"{case.vae} does not decode to {case.frames} frames of {case.height}x{case.width}: frames must be "
            f"{decoder.frame_count(1)} + a multiple of 4, height and width multiples of {factor}."
        )
    shape = (1, decoder.latent_channels, count, case.height // factor, case.width // factor)
    return torch.randn(shape, device="cpu")  # the same ones for every device
