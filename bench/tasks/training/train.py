"""Training: one restorer on one task, through accelerate.

    python -m bench.tasks train --task inpainting --gradient chop-1 --out runs/mine --folder my_videos
    accelerate launch --num_processes 2 -m bench.tasks train ...

A run in the same folder goes on where it stopped; on the CPU it then ends with the same bits as one that was never cut.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from bench.tasks import task_by_name
from bench.tasks.data.order import Order
from bench.tasks.data.pairs import ClipShape, Pairs, from_bytes, spatial_factor, vae_key
from bench.tasks.pictures import side_by_side, write_video
from bench.tasks.training.arms import CONTROLS, arm_by_name
from bench.tasks.training.checkpoints import (
    DecoderState,
    follow,
    last_checkpoint,
    only_what_trains,
    same_run,
    save_checkpoint,
)
from bench.tasks.training.objective import Objective
from bench.tasks.training.restorer import Restorer, family_for, fresh_backbone, pretrained_backbone, read_prompt
from bench.tasks.training.settings import TrainSettings
from bench.tasks.training.weights import load_weights, save_weights
from chopgrad import decoder_for
from suite.progress import Bar
from suite.vaes import load_vae

UNSEEN = 1_000_000
"""Clips from this number on are never trained on."""


class Training:
    """A run and where it stands.

    Raises:
        ValueError: a setting, the VAE, the transformer or the clips do not fit; nothing is written then.
    """

    def __init__(self, settings: TrainSettings) -> None:
        settings.check()
        # Under autocast Wan's norms take half-precision features and float32 weights; torch warns, and is right anyway.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        self.settings = settings
        self.task, self.arm = task_by_name(settings.task, settings.folder), arm_by_name(settings.arm)
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate,
            log_with=settings.tracker,
            project_dir=str(settings.out),
            cpu=settings.cpu,
        )
        self.device = self.accelerator.device
        set_seed(settings.seed)
        trains_decoder = self.task.trains_decoder and self.arm.pixels and self.arm.trains_decoder
        if settings.arm in CONTROLS and not self.task.trains_decoder:
            raise ValueError(
                f"'{settings.arm}' is a control for tasks whose decoder trains, as in driving: pass another."
            )
        half = settings.mixed_precision == "bf16" and settings.pretrained is not None and not trains_decoder
        self.vae: Any = load_vae(
            settings.vae, self.device, torch.bfloat16 if half else torch.float32, settings.subfolder
        )
        # Without the clamp, so that saturated pixels have a gradient; what is scored and shown is clamped.
        self.decoder = decoder_for(self.vae, clamp=False, checkpoint=settings.checkpoint)
        self.spatial_factor = spatial_factor(self.vae)
        if any(n % self.spatial_factor for n in settings.size):
            raise ValueError(
                f"This VAE has one latent for {self.spatial_factor}x{self.spatial_factor} pixels: pass a --size of "
                f"multiples of {self.spatial_factor}, got {settings.size[0]} {settings.size[1]}."
            )
        self.shape = ClipShape(settings.frames, *settings.size)
        self.data = self.clips(range(settings.clips))
        self.model: Any = self._restorer()
        latent_size = [n // self.spatial_factor for n in settings.size]
        self.model.check(self.decoder.latent_channels, self.data.latent_frames, *latent_size)
        if settings.gradient_checkpointing:
            self.model.backbone.enable_gradient_checkpointing()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, settings.rate)
        self.decoder_state = None
        if trains_decoder:
            warnings.filterwarnings("ignore", message=r"\d+ parameters of the decoder")  # here they are meant
            for parameter in self.decoder.parameters():
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(list(self.decoder.parameters()), settings.decoder_rate)
            self.decoder_state = DecoderState(self.decoder, optimizer)
            self.accelerator.register_for_checkpointing(self.decoder_state)
        if settings.start is not None:
            load_weights(settings.start, self.model, self.vae)
        self.objective = Objective(self.task, self.arm, self.decoder, self.device, settings.perceptual_stride)
        only_what_trains(self.accelerator)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.step = 0
        self.step_seconds: list[float] = []

    def clips(self, seeds: Sequence[int]) -> Pairs:
        """Clips of the task by number, for this run's VAE."""
        return Pairs(self.task, self.decoder, vae_key(self.vae), seeds, self.shape, self.settings.cache)

    def _restorer(self) -> Restorer:
        s = self.settings
        family = family_for(self.vae)
        prompt = None if s.prompt is None else read_prompt(s.prompt)
        if s.pretrained is None:
            height, width = (n // self.spatial_factor for n in s.size)
            shape = (self.data.latent_frames, height, width)
            backbone = fresh_backbone(family, self.decoder.latent_channels, shape, s.width, s.layers, s.seed)
            return Restorer(backbone, s.timestep, prompt)
        dtype = torch.bfloat16 if s.mixed_precision == "bf16" else torch.float32
        backbone, scheduler = pretrained_backbone(s.pretrained, family, s.lora_rank, dtype)
        return Restorer(backbone, s.timestep, prompt, scheduler)

    def run(self) -> None:
        """Train to the last step, and write weights, pictures and ``finished.json``."""
        s, main = self.settings, self.accelerator.is_main_process
        if main:
            same_run(s.out / "run.json", s)
        self.accelerator.wait_for_everyone()
        if main:
            self.data.prepare("training")
        self.accelerator.wait_for_everyone()
        self._resume()
        log = follow(s.out / "losses.jsonl", self.step) if main else None
        if s.tracker:
            self.accelerator.init_trackers("chopgrad", config={k: str(v) for k, v in s.described().items()})
        with Bar(f"{s.task}, {s.arm}", s.steps, self.step, shown=main) as bar:
            for batches in self._updates():
                begun = time.perf_counter()
                terms = self.update(batches)
                self.step_seconds.append(time.perf_counter() - begun)
                self.step += 1
                bar.advance(note=", ".join(f"{k} {v:.3g}" for k, v in terms.items()))
                if log:
                    log({"step": self.step, **terms, "seconds": self.step_seconds[-1]})
                if s.tracker:
                    self.accelerator.log(terms, step=self.step)
                if self.step % s.checkpoint_every == 0 or self.step == s.steps:
                    save_checkpoint(self.accelerator, s.out / "checkpoints", self.step)
                if s.sample_every and self.step % s.sample_every == 0:
                    self.sample()
        self.finish()

    def update(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """One step of the optimisers, from ``accumulate`` forward passes; returns the terms of the loss."""
        sums: dict[str, float] = {}
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    restored = self.model(batch["condition_latents"].to(self.device))
                    loss, terms = self.objective(restored, batch, self.step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip_and_share()
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
        if self.decoder_state:
            self.decoder_state.optimizer.step()
            self.decoder_state.optimizer.zero_grad()
        shared = self.accelerator.reduce(torch.tensor(list(sums.values()), device=self.device), "mean")
        return dict(zip(sums, shared.tolist(), strict=True))

    def _clip_and_share(self) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        if self.decoder_state:  # the VAE is not called as a whole, so nothing shares its gradients unasked
            parameters = self.decoder_state.parameters
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)

    def _updates(self) -> Iterator[list[dict[str, Tensor]]]:
        s, a = self.settings, self.accelerator
        order = Order(
            len(self.data), s.batch, s.seed, self.step * s.accumulate, s.steps * s.accumulate, a.process_index,
            a.num_processes,
        )  # fmt: skip
        batches = iter(DataLoader(self.data, batch_sampler=order))
        for _ in range(self.step, s.steps):
            yield [next(batches) for _ in range(s.accumulate)]

    def _resume(self) -> None:
        found = last_checkpoint(self.settings.out / "checkpoints")
        if found:
            self.accelerator.load_state(str(found[0]))
            self.step = found[1]
            self.accelerator.print(f"Going on from step {self.step} of {self.settings.steps}.")

    @torch.no_grad()
    def restore(self, condition_latents: Tensor) -> Tensor:
        """[batch, channels, latent frames, h, w] normalised -> frames [batch, 3, frames, H, W] in [-1, 1]."""
        latents = self.restored_latents(condition_latents)
        return torch.cat([self.decoder.decode(z[None]) for z in latents]).float().clamp(-1, 1)

    @torch.no_grad()
    def restored_latents(self, condition_latents: Tensor) -> Tensor:
        """The same in the VAE's own space, as the decoder takes them: [batch, channels, latent frames, h, w]."""
        with self.accelerator.autocast():
            restored = self.model(condition_latents.to(self.device)).float()
        weights = next(iter(self.decoder.parameters()))
        return self.decoder.denormalize(restored).to(weights.dtype)

    def sample(self) -> None:
        """Pictures and videos of unseen clips, under ``samples/step-N``."""
        if not self.settings.samples:
            return
        unseen = self.clips(range(UNSEEN, UNSEEN + self.settings.samples))
        if self.accelerator.is_main_process:
            unseen.prepare("unseen")
        self.accelerator.wait_for_everyone()
        rows = []
        for k in range(len(unseen)):
            item = unseen[k]
            restored = self.restore(item["condition_latents"][None])[0].cpu()
            rows.append(
                {"condition": from_bytes(item["condition"]), "restored": restored, "target": from_bytes(item["target"])}
            )
        if self.accelerator.is_main_process:
            folder = self.settings.out / "samples" / f"step-{self.step:08d}"
            side_by_side(folder / "sheet.png", rows, f"{self.settings.task}, {self.settings.arm}, step {self.step}")
            for k, videos in enumerate(rows):
                write_video(folder / f"clip-{k}.mp4", torch.cat(list(videos.values()), dim=3))

    def finish(self) -> None:
        """Write the weights as diffusers reads them, the last pictures, and what the run took."""
        save_weights(self.accelerator, self.settings.out, self.model, self.vae if self.decoder_state else None)
        self.sample()
        if self.accelerator.is_main_process:
            seconds = sorted(self.step_seconds)
            done = {
                "steps": self.step,
                "median_step_seconds": seconds[len(seconds) // 2] if seconds else None,
                "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            }
            (self.settings.out / "finished.json").write_text(json.dumps(done) + "\n")
        if self.settings.tracker:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
