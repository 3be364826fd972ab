"""The restoration task with a published transformer in the small backbone's place.

The transformer takes the degraded clip's latents for a noisy sample at one noise level and restores them in one step,
as fine-tuning in the end tasks starts (``bench.tasks.training.restorer``; arXiv 2603.17812, Sec. 4). Its weights are
measured as they were published; there is no warm-up, unless LoRA layers are asked for and get one.

Of 1.4 billion parameters, the gradients of every clip under every truncation cannot be kept. What is kept is a seeded
sample of coordinates, in which each parameter has the same chance (``analysis.backbone.coordinates``): every measure
of Fig. 4 and Adam's update are made of terms of single coordinates, so the sample estimates those of the whole
transformer. A run with fewer ``--coordinates`` shows how much the sampling adds. Two other reductions narrow what is
differentiated:

- ``--parameters REGEX``: the parameters whose names it is found in;
- ``--lora-rank N``: fresh LoRA layers, which are what most people train. Before any training their second factor is
  zero and their first is Gaussian noise A, so the gradient is dL/dW A^T: a random projection of the weights' gradient,
  which keeps squared norms and inner products (hence relative error and cosine) on average, but not absolute values.

Memory: the device holds the transformer, the graphs of one clip, and one gradient at a time; the host holds
4 bytes x clips x truncations x coordinates, and some 200 bytes x clips x coordinates for the statistics.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.backbone.coordinates import Coordinates, sampled_coordinates
from analysis.backbone.mean_gradient import CHUNK
from analysis.backbone.restoration import Restoration, trained_parameters
from analysis.backbone.task_settings import TaskSettings
from bench.tasks.training.restorer import Restorer, family_for, pretrained_backbone, read_prompt
from suite.fingerprint import inputs_sha256
from suite.records import ROOT

COPIES = 6
"""What ``analysis.backbone.mean_gradient`` holds at once of its largest array: 5.2 were measured, with 12 clips."""


@dataclass(frozen=True)
class PublishedSettings:
    """Which published transformer, and what of its gradient."""

    pretrained: str | None = None
    """Measure the transformer of a published pipeline (a hub id, or a folder with transformer/ in it) and not the small
    backbone. The options below need it."""
    parameters: str | None = None
    """Regular expression: only the parameters in whose names it is found, such as 'attn1' or 'blocks.(0|29)[.]'."""
    coordinates: int = 1_000_000
    """How many coordinates of the gradient are kept, a seeded sample of all."""
    lora_rank: int = 0
    """Rank of fresh LoRA layers, whose gradient is then measured; 0: the transformer's own weights."""
    warm_up: bool = False
    """Train the LoRA layers in latent space first, by task.warm-up-steps, -clips and -rate."""
    prompt: Path | None = None
    """A safetensors file with ``prompt_embeds`` [1, tokens, width]; zeros without it."""
    timestep: int = 400
    """The noise level that the condition is taken for, 1 to 999."""
    gradient_checkpointing: bool = False
    """Recompute the transformer's blocks in every backward pass: less memory, more time."""

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        if self.pretrained is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    option = field.name.replace("_", "-")
                    raise ValueError(f"--{option} is about a published transformer: pass --pretrained too.")
            return
        try:
            re.compile(self.parameters or "")
        except re.error as error:
            raise ValueError(f"--parameters is not a regular expression ({error}): got '{self.parameters}'.") from None
        if self.coordinates < 1 or self.lora_rank < 0 or not 1 <= self.timestep <= 999:
            raise ValueError(
                "At least 1 coordinate, a LoRA rank of at least 0 and a timestep from 1 to 999 are needed, got "
                f"{self.coordinates}, {self.lora_rank} and {self.timestep}."
            )
        if self.warm_up and not self.lora_rank:
            raise ValueError("--warm-up trains LoRA layers: pass --lora-rank of at least 1 too.")
        if self.prompt is not None and not self.prompt.is_file():
            raise ValueError(f"No file '{self.prompt.name}' for --prompt: pass a safetensors file with prompt_embeds.")

    @property
    def name(self) -> str:
        """For files: the last part of the folder or hub id."""
        return Path(self.pretrained or "").resolve().name


class PublishedRestoration(Restoration):
    """The task with the transformer of ``published.pretrained``, in a ``bench.tasks.training.restorer.Restorer``.

    Raises:
        ValueError: as ``Restoration``; or the transformer cannot be loaded, or does not fit the VAE, the size of the
            clips or the prompt; or no parameter has such a name.
    """

    clips_at_once = 1

    def __init__(self, settings: TaskSettings, published: PublishedSettings, seed: int = 0) -> None:
        published.check()
        super().__init__(settings)
        self.published, self.seed = published, seed
        prompt = None if published.prompt is None else read_prompt(published.prompt)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the LoRA layers
            backbone, scheduler = pretrained_backbone(
                published.pretrained or "", family_for(self.vae), published.lora_rank, self.dtype
            )
        self.restorer = Restorer(backbone, published.timestep, prompt, scheduler).to(self.device).eval()
        self.restorer.check(self.decoder.latent_channels, self.latent_frames, *self.latent_size)
        if published.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        if published.parameters is not None:
            _select(self.restorer.backbone, published.parameters)

    def described(self) -> dict[str, Any]:
        """Of the task's settings those that count here, and the transformer's."""
        without = ("width", "layers") if self.published.warm_up else ("width", "layers", "warm_up")
        task = {k: v for k, v in super().described().items() if not k.startswith(without)}
        own = {f.name: getattr(self.published, f.name) for f in fields(self.published)}
        own |= {"pretrained": self.published.name, "prompt": self.published.prompt and self.published.prompt.name}
        del own["gradient_checkpointing"]  # recomputes the same numbers
        return task | {"published": own | {"parameters_in_all": self.kept.total, "transformer_sha256": self._sha256}}

    @cached_property
    def _sha256(self) -> str:
        """Of the transformer as it was loaded, fresh LoRA layers and the prompt included."""
        prompt = self.restorer.prompt.float().cpu().numpy().tobytes()
        return hashlib.sha256(inputs_sha256(self.restorer).encode() + prompt).hexdigest()

    @cached_property
    def kept(self) -> Coordinates:
        """The coordinates that are kept of every gradient."""
        return sampled_coordinates(trained_parameters(self.restorer), self.published.coordinates, self.seed)

    def coordinates(self, backbone: nn.Module) -> Coordinates:
        return self.kept

    def new_backbone(self, seed: int) -> Any:
        return self.restorer

    def warmed_up(self, fingerprint: str, seed: int = 0, cache: Path = ROOT / "runs" / "restoration") -> nn.Module:
        """The transformer as it is; with ``published.warm_up`` its LoRA layers are trained first."""
        return super().warmed_up(fingerprint, seed, cache) if self.published.warm_up else self.restorer

    def predict(self, backbone: Any, condition: Tensor) -> Tensor:
        half = self.dtype == torch.bfloat16
        # As the trainer runs it: the condition stays in float32, the transformer computes in half precision.
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            return backbone(condition).float()

    def bytes_needed(self, clips: int, truncations: int) -> dict[str, int]:
        """What is known before any work; the graphs of transformer and decoder on the device come on top."""
        s, trained = self.settings, trained_parameters(self.restorer)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        return {
            "device: transformer and VAE": size([*self.restorer.parameters(), *self.vae.parameters()]),
            "device: one gradient": size(trained),
            "device: clips": clips * 3 * s.frames * s.size**2 * 4,
            "host: gradients that are kept": 4 * clips * truncations * len(self.kept),
            "host: statistics": COPIES * 4 * max(8 * clips, CHUNK) * len(self.kept),
        }


def _select(backbone: nn.Module, pattern: str) -> None:
    """Only parameters with such a name require a gradient from here on.

    Raises:
        ValueError: there is none among those that did.
    """
    names = [name for name, p in backbone.named_parameters() if p.requires_grad]
    chosen = {name for name in names if re.search(pattern, name)}
    if not chosen:
        some = ", ".join(names[:: max(1, len(names) // 3)][:3])
        raise ValueError(
            f"No parameter's name matches --parameters '{pattern}': there are {len(names)}, such as {some}."
        )
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)
