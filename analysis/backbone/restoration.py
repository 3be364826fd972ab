"""The gradient that reaches a backbone: one end task (deblurring) on one VAE, with a pixel loss through the decoder.

Clips, their latents and the one-step model are those of ``bench.tasks``. The backbone is small, big enough to learn
something and small enough that the gradient of every one of its parameters can be kept for a whole data set; a warm-up
in latent space makes what all measurements start from. ``analysis.backbone.published`` puts a published transformer in
its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.backbone import samples as samples_module
from analysis.backbone.coordinates import Coordinates, sampled_coordinates
from analysis.backbone.samples import Samples
from analysis.backbone.task_settings import TaskSettings
from bench.tasks.data.pairs import ClipShape, Pairs, clips_code, from_bytes, spatial_factor, vae_key
from bench.tasks.deblurring import Deblurring
from bench.tasks.training import restorer
from bench.tasks.training.restorer import Restorer, family_for, fresh_backbone
from chopgrad import CausalDecoder, FrameGroup, decoder_for
from suite.fingerprint import inputs_sha256
from suite.pairwise import pairwise_gradients
from suite.progress import track
from suite.records import ROOT
from suite.sizes import check_size, latent_frames
from suite.vaes import load_vae

LossFn = Callable[[Tensor, Tensor], Tensor]
MOST_CLIPS = 1_000
"""Of one seed."""
MOST_SEEDS = 2**32 // MOST_CLIPS
"""PyTorch's generator of the CPU takes so many bits of a clip's number."""
CODE = tuple(Path(str(module.__file__)) for module in (restorer, samples_module)) + (Path(__file__),)
"""What decides how a backbone is warmed up, beside the code of the clips."""


class Restoration:
    """The task on one VAE: clips, backbone, prediction. Clips and models lie on ``settings.device``.

    Raises:
        ValueError: a setting is out of range, the VAE cannot be loaded, or does not decode to such clips.
    """

    clips_at_once = 4
    """Clips that are decoded and differentiated in one batch."""

    def __init__(self, settings: TaskSettings) -> None:
        settings.check()
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.vae: Any = load_vae(settings.vae, settings.device, self.dtype, settings.subfolder)
        self.device = next(self.vae.parameters()).device
        self.decoder: CausalDecoder = decoder_for(self.vae)
        self.latent_frames = latent_frames(self.decoder, settings.frames)
        self.groups: list[FrameGroup] = self.decoder.frame_groups(self.latent_frames)
        check_size(self.vae, self.decoder, settings.size)
        self.latent_size = (settings.size // spatial_factor(self.vae),) * 2

    def described(self) -> dict[str, Any]:
        """The task's settings as JSON values for a record."""
        return self.settings.described()

    def fingerprint(self, films: list[Path] | None = None) -> str:
        """Hash of the VAE's weights and of films; where there are none, of those that the warm-up sees."""
        return inputs_sha256(self.vae, films or list(samples_module.training_films()))

    def samples(self, count: int, seed: int, films: Sequence[Path] | None = None) -> Samples:
        """Seeded clips, the same ones on every device; those of different seeds differ.

        Args:
            films: crops of these in turn; of none, generated motion alone, whose clips are independent; None
                is the training diet, half generated and half crops of the training films.

        Raises:
            ValueError: more clips than a seed has, a seed out of range, or a film that is too short.
        """
        if not 1 <= count <= MOST_CLIPS or not 0 <= seed < MOST_SEEDS:
            raise ValueError(
                f"Pass 1 to {MOST_CLIPS} clips and a seed from 0 to {MOST_SEEDS - 1}, got {count} and {seed}."
            )
        s, mixed = self.settings, films is None
        task = Deblurring(
            blur=s.blur, shrink=s.shrink, noise=s.noise, mixed=mixed,
            films=samples_module.training_films() if films is None else tuple(films),
        )  # fmt: skip
        numbers = range(seed * MOST_CLIPS, seed * MOST_CLIPS + count)
        pairs = Pairs(task, self.decoder, vae_key(self.vae), numbers, ClipShape(s.frames, s.size, s.size), None)
        batch = pairs.batch(range(count))
        sources = [film.name if (film := task.film(n)) else f"generated {n}" for n in numbers]
        tensors = (from_bytes(batch["target"]), batch["condition_latents"], batch["latents"])
        return Samples(sources, *(x.to(self.device) for x in tensors))

    def new_backbone(self, seed: int) -> Any:
        """A seeded ``Restorer`` whose last layer is zero, so that it starts by returning (CogVideoX: scaling) its
        condition.
        """
        s = self.settings
        shape = (self.latent_frames, *self.latent_size)
        backbone = fresh_backbone(family_for(self.vae), self.decoder.latent_channels, shape, s.width, s.layers, seed)
        return Restorer(backbone).to(self.device)

    def coordinates(self, backbone: nn.Module) -> Coordinates:
        """Which coordinates of the backbone's gradients are kept: all of its trained parameters."""
        return sampled_coordinates(trained_parameters(backbone))

    def predict(self, backbone: Any, condition: Tensor) -> Tensor:
        """[batch, channels, latent frames, h, w] condition -> restored latents, both normalised and in float32."""
        return backbone(condition)

    def restore(self, backbone: nn.Module | None, condition: Tensor) -> Tensor:
        """The same in the VAE's own space and precision; without a backbone the condition itself."""
        restored = condition if backbone is None else self.predict(backbone, condition)
        return self.decoder.denormalize(restored).to(self.dtype)

    @torch.no_grad()
    def pixel_loss(self, backbone: nn.Module | None, samples: Samples, loss_fn: LossFn = F.mse_loss) -> list[float]:
        """The loss of each clip."""
        losses = []
        for k in range(0, len(samples), self.clips_at_once):
            part = samples[k : k + self.clips_at_once]
            decoded = self.decoder.decode(self.restore(backbone, part.condition)).float()
            losses += [loss_fn(x[None], y[None]).item() for x, y in zip(decoded, part.clean, strict=True)]
        return losses

    @torch.no_grad()
    def drawn(self, samples: Samples) -> Samples:
        """The same with what the decoder draws of the clean latents in the place of the clips."""
        parts = [samples[k : k + self.clips_at_once] for k in range(0, len(samples), self.clips_at_once)]
        clean = [self.decoder.decode(self.restore(None, part.clean_as_condition().condition)) for part in parts]
        return replace(samples, clean=torch.cat(clean).to(samples.clean))

    def warmed_up(self, fingerprint: str, seed: int = 0, cache: Path = ROOT / "runs" / "restoration") -> nn.Module:
        """The backbone after its training in latent space; read back when the same one was trained before.

        Args:
            fingerprint: of the weights and the clips; with the settings, the seed, the kind of device and this task's
                code it names the cached file, so nothing is read back over a change.

        Cost: about 25 ms a step for the default settings on one core.
        """
        s = self.settings
        code = hashlib.sha256(b"".join(path.read_bytes() for path in CODE)).hexdigest()
        key = json.dumps([self.described(), fingerprint, seed, self.device.type, code, clips_code()])
        path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        backbone = self.new_backbone(seed)
        trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        if path.exists():
            saved = load_file(path)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(saved[name])
            return backbone
        data = self.samples(s.warm_up_clips, seed=1_000_000 + seed)
        optimizer = torch.optim.Adam(trained.values(), s.warm_up_rate)
        generator = torch.Generator().manual_seed(seed)
        bar = track(range(s.warm_up_steps), description="latent warm-up")
        for _ in bar:
            rows = torch.randint(len(data), (4,), generator=generator)
            predicted = self.predict(backbone, data.condition[rows])
            optimizer.zero_grad()
            F.mse_loss(predicted, data.latents[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in trained.items()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return backbone

    def latent_pairs(self, backbone: nn.Module, samples: Samples, loss_fn: LossFn) -> Tensor:
        """dL_i/dz_j of each clip's own loss: [clips, i, j, channels, latents per group, h, w], in float32.

        Cost: one decode of the batch and T backward passes; activations of the whole batch in memory.
        """
        with torch.no_grad():
            restored = self.restore(backbone, samples.condition)
        (pairs,) = pairwise_gradients(self.decoder, restored, samples.clean, [in_full_precision(loss_fn)])
        return pairs.float().movedim(2, 0) * len(samples)  # the loss is a mean over the batch

    def parameter_gradients(
        self, backbone: nn.Module, condition: Tensor, latent_gradients: Tensor, kept: Coordinates | None = None
    ) -> Tensor:
        """Gradients of the backbone's trained parameters from gradients of one clip's latents.

        One graph of the backbone serves all of them: the truncation ends where the backbone begins.

        Args:
            condition: [1, channels, latent frames, h, w].
            latent_gradients: [k, groups, channels, latents per group, h, w].
            kept: which coordinates; those of ``coordinates`` if None.

        Returns:
            [k, parameters], on the CPU, where they are kept for many clips.

        Cost: k backward passes of the backbone; one gradient at a time on the device.
        """
        parameters = trained_parameters(backbone)
        kept = kept or self.coordinates(backbone)
        restored = self.restore(backbone, condition)
        rows = []
        for gradient in latent_gradients:
            adjoint = join_groups(gradient, self.groups)[None].to(restored)
            parts = torch.autograd.grad(restored, parameters, adjoint, retain_graph=True, allow_unused=True)
            rows.append(kept.values(parameters, parts))
        return torch.stack(rows)


def trained_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Those that require a gradient, in the model's order."""
    return [p for p in backbone.parameters() if p.requires_grad]


def in_full_precision(loss_fn: LossFn) -> LossFn:
    """``loss_fn`` of frames that are cast to float32 first."""
    return lambda frames, target: loss_fn(frames.float(), target)


def join_groups(parts: Tensor, groups: list[FrameGroup]) -> Tensor:
    """[groups, channels, latents per group, h, w] -> [channels, latent frames, h, w]; unused places are dropped."""
    return torch.cat([x[:, : g.latents.stop - g.latents.start] for x, g in zip(parts, groups, strict=True)], dim=1)
