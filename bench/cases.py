"""What is measured: a VAE, a video size, a loss and a strategy. Latents and targets are random; they cost the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor

import chopgrad
from chopgrad import CausalDecoder, Chop, Exact, Full, Strategy
from suite.losses import loss_by_name
from suite.vaes import EMBEDDED, load_vae

FULL_SIZE: dict[str, Callable[[], Any]] = {
    "full:wan2.1": AutoencoderKLWan,  # the defaults of both classes are the published architectures
    "full:cogvideox": AutoencoderKLCogVideoX,
}

STRATEGIES: tuple[Strategy, ...] = (
    Full(),
    Exact(),
    Exact(pieces=True),
    Exact(offload=True),
    Exact(offload=True, pieces=True),
    Chop(0),
    Chop(1),
    Chop(2),
    Chop(4),
    Chop(1, block=4),
    Chop(1, block=8),
    Chop(1, block=8, recompute=True),
)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        vae: name of an embedded decoder, or ``full:wan2.1`` / ``full:cogvideox`` for the published architecture with
            random weights (memory and time do not depend on the weights).
        frames, height, width: of the decoded video, in pixels.
        strategy: how it is differentiated.
    """

    vae: str
    frames: int
    height: int
    width: int
    strategy: Strategy
    loss: str = "mse"
    dtype: str = "float32"
    device: str = "cpu"
    trainable_decoder: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique, and a good file name."""
        words = [self.vae.replace(":", "-"), f"{self.frames}f", f"{self.height}x{self.width}", self.loss, self.dtype]
        words += ["decoder"] * self.trainable_decoder + [torch.device(self.device).type, slug(self.strategy)]
        return "-".join(words)

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "strategy": label(self.strategy)}


def label(strategy: Strategy) -> str:
    """The strategy as written in code, without settings left at their default: ``Chop(1, block=4, recompute)``."""
    words = [str(strategy.distance)] if isinstance(strategy, Chop) else []
    if isinstance(strategy, Chop) and strategy.block > 1:
        words.append(f"block={strategy.block}")
    words += [f"every={strategy.every}"] if isinstance(strategy, Exact) and strategy.every > 1 else []
    words += [flag for flag in ("recompute", "offload", "pieces") if getattr(strategy, flag, False)]
    return f"{type(strategy).__name__}({', '.join(words)})"


def slug(strategy: Strategy) -> str:
    return "".join(c if c.isalnum() else "_" for c in label(strategy).lower()).replace("__", "_").strip("_")


def grid(vae: str, frames: list[int], sizes: list[tuple[int, int]], **common: Any) -> Iterator[Case]:
    """All strategies at every frame count and size, smallest videos first."""
    for height, width in sizes:
        for count in frames:
            for strategy in strategies(common["device"]):
                yield Case(vae, count, height, width, strategy, **common)


def strategies(device: str) -> list[Strategy]:
    """Those that differ on this device: on a CPU there is nowhere to offload to."""
    on_cpu = torch.device(device).type == "cpu"
    return [s for s in STRATEGIES if not (on_cpu and getattr(s, "offload", False))]


def cases(device: str, full: bool = False) -> list[Case]:
    """The embedded decoders (minutes on two cores), or the published architectures in bfloat16 for a GPU."""
    if not full:
        small = grid("wan2.1", [17, 33, 65], [(32, 32)], device=device)
        large = grid("wan2.1", [17], [(64, 64)], device=device)
        return [*small, *large, *grid("cogvideox", [17, 33, 65], [(32, 32)], device=device)]
    sizes = [(256, 448), (480, 832), (720, 1280)]
    return [case for vae in FULL_SIZE for case in grid(vae, [17, 33, 49, 97], sizes, device=device, dtype="bfloat16")]


class Subject:
    """A case made ready to run: decoder, latents, target and loss on the device."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        dtype = getattr(torch, case.dtype)
        self.decoder = _decoder(case.vae, case.device, dtype)
        if case.trainable_decoder:
            self.decoder.vae.decoder.requires_grad_(True)
        self.latents = _latents(self.decoder, case).to(case.device, dtype)
        shape = (1, 3, case.frames, case.height, case.width)
        self.target = (torch.rand(shape) * 2 - 1).to(dtype)  # stays on the host; the loss fetches it group by group
        self.loss_fn = loss_by_name(case.loss, case.device, dtype)

    def run(self, strategy: Strategy | None = None) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the latents): the work that is measured."""
        leaf = self.latents.detach().clone().requires_grad_()
        parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        loss = chopgrad.frame_loss(self.decoder, leaf, self.target, self.loss_fn, strategy or self.case.strategy)
        gradient, *_ = torch.autograd.grad(loss, [leaf, *parameters])
        return loss.detach(), gradient


def _decoder(vae: str, device: str, dtype: torch.dtype) -> CausalDecoder:
    if vae in FULL_SIZE:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = FULL_SIZE[vae]().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(previous)
    elif vae in EMBEDDED:
        model = load_vae(vae, device, dtype)
    else:
        raise ValueError(f"Unknown VAE '{vae}': pass one of {', '.join([*EMBEDDED, *FULL_SIZE])}.")
    return chopgrad.decoder_for(model)


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
    return torch.randn(1, decoder.latent_channels, count, case.height // factor, case.width // factor)
