"""Every setting of a training run, as a command line has it. (``arm``: what the comparison of end tasks calls it.)"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class TrainSettings:
    """Fine-tune a one-step restorer: a clip in, a better clip out, in one pass of a Wan or CogVideoX transformer.

    Under ``accelerate launch`` it runs on several GPUs, with DDP or FSDP.
    """

    task: str
    """super-resolution, artifact-removal, inpainting, inpainting-objects, driving or deblurring."""
    out: Path
    """Folder of the run: checkpoints, losses, pictures, weights. An interrupted run in it goes on where it stopped."""
    folder: Path | None = None
    """Your videos: a folder of them (super-resolution, inpainting, deblurring), or condition/ and target/ in it (the
    rest); generated clips without it."""
    arm: Annotated[str, arg(name="gradient")] = "exact-offload"
    """How the pixel loss is differentiated. exact-offload: exactly, in the least device memory; exact: faster on small
    videos; chop-1: truncated after one frame group, the paper's setting; more in ``python -m bench.tasks list``."""
    vae: str = "wan2.1"
    """wan2.1 or cogvideox (embedded), a folder, or a hub id."""
    subfolder: str | None = None
    """Where the VAE lies inside --vae (vae for the published pipelines)."""
    checkpoint: Literal["auto", "frame", "residual", "block"] | None = "auto"
    """Recompute inside a frame group of the decoder: see ``chopgrad.decoder_for``."""
    pretrained: str | None = None
    """A published pipeline (folder or hub id) whose transformer is fine-tuned; without it a small fresh one."""
    lora_rank: int = 32
    """Rank of the LoRA layers of a pretrained transformer; 0 trains all of its weights."""
    prompt: Path | None = None
    """A safetensors file with ``prompt_embeds`` [1, tokens, width] of the one prompt; zeros without it."""
    timestep: int = 400
    """The noise level that the condition is taken for, 1 to 999."""
    width: int = 96
    """Inner width of a fresh transformer, a multiple of 32."""
    layers: int = 3
    """Its blocks."""
    start: Path | None = None
    """Folder of a finished run whose weights this one starts from."""
    frames: int = 25
    """Frames of a clip."""
    size: tuple[int, int] = (64, 64)
    """Height and width of a clip in pixels."""
    clips: int = 64
    """How many clips the task makes for training; they are kept on disk with their latents."""
    steps: int = 200
    """Updates of the weights."""
    batch: int = 2
    """Clips a forward pass, over all processes."""
    accumulate: int = 1
    """Forward passes an update."""
    rate: float = 3e-4
    """Learning rate of AdamW."""
    decoder_rate: float = 3e-5
    """That of the decoder, where the task trains it."""
    clip_norm: float = 1.0
    """Longest gradient."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: autocast; a pretrained transformer and the VAE are then kept in bf16."""
    perceptual_stride: int = 1
    """Perceptual losses look at every so-many-th frame of a group, in turn: cheaper, and all frames have their say."""
    gradient_checkpointing: bool = False
    """Recompute the transformer's blocks in its backward pass."""
    seed: int = 0
    """Of fresh weights and of the order of clips."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    samples: int = 4
    """Unseen clips that are shown as pictures and videos."""
    sample_every: int = 0
    """Steps between them; 0: only at the end."""
    tracker: str | None = None
    """A tracker of accelerate, such as tensorboard or wandb, if it is installed."""
    cpu: bool = False
    """Leave a GPU alone."""
    cache: Path = Path("runs/tasks/clips")
    """Where clips and their latents are kept."""

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        positive = ("frames", "clips", "steps", "batch", "accumulate", "checkpoint_every", "width", "layers",
                    "perceptual_stride")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lora_rank", "samples", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("rate", "decoder_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.batch > self.clips:
            raise ValueError(f"A batch of {self.batch} needs at least as many clips, got {self.clips}.")

    def everything(self) -> dict[str, Any]:
        """All settings as JSON values, paths as they are: to make the same run again on this machine."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    def described(self) -> dict[str, Any]:
        """What makes the result, as JSON values; of an absolute path only the last part."""
        left_out = ("out", "cache", "checkpoint_every", "samples", "sample_every", "tracker", "cpu")
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items() if k not in left_out}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return Path(value).name
    return value


def settings_from(values: dict[str, Any], **changes: Any) -> TrainSettings:
    """The settings that ``everything`` wrote, with changes."""
    values = dict(values) | changes
    for name in ("out", "folder", "prompt", "start", "cache"):
        values[name] = None if values[name] is None else Path(values[name])
    return TrainSettings(**(values | {"size": tuple(values["size"])}))
