"""End tasks (arXiv 2603.17812, Sec. 4): look at them, compare the arms, fine-tune on your own videos, restore a video.

python -m bench.tasks preview --task driving --out sheet.png

python -m bench.tasks run                       # one task, three arms, small; --full: the committed protocol

python -m bench.tasks train --task super-resolution --folder my_videos --out runs/mine

python -m bench.tasks restore --run runs/mine --video blurred.mp4 --out sharp.mp4
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import subcommand

from bench.tasks import TASKS, task_by_name
from bench.tasks.preview import contact_sheet
from bench.tasks.protocol import Protocol
from bench.tasks.training.arms import MEANING
from bench.tasks.training.settings import TrainSettings
from suite.command_line import run_main


@dataclass
class Preview:
    """A contact sheet: one row a seed, the condition on the left, the target on the right."""

    task: str
    """One of super-resolution, artifact-removal, inpainting, inpainting-objects, driving, deblurring."""
    out: Path
    """The PNG to write."""
    folder: Path | None = None
    """Real footage: a folder of videos (super-resolution, inpainting, deblurring), or condition/ and target/ in it."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Numbers of the clips."""
    frames: int = 17
    """Frames of a clip."""
    size: tuple[int, int] = (96, 96)
    """Height and width in pixels."""
    shown: int = 4
    """How many frames of each clip the sheet shows."""


@dataclass
class List:
    """The tasks, their losses and whether the decoder trains; and how a pixel loss can be differentiated."""


@dataclass
class Restore:
    """Apply a finished run to a video."""

    run: Path
    """The --out of a finished ``train``."""
    video: Path
    """The video to restore; it is cut to a number of frames that the VAE decodes to, and to its spatial factor."""
    out: Path
    """The .mp4 to write."""
    frames: int | None = None
    """At most so many frames. None: all."""
    cpu: bool = False
    """Leave a GPU alone."""


Command = (
    Annotated[Preview, subcommand("preview")]
    | Annotated[List, subcommand("list")]
    | Annotated[Protocol, subcommand("run")]
    | Annotated[TrainSettings, subcommand("train")]
    | Annotated[Restore, subcommand("restore")]
)


def main(command: Preview | List | Protocol | TrainSettings | Restore) -> None:
    if isinstance(command, List):
        for name, task in TASKS.items():
            losses = " + ".join(f"{t.weight:g} {t.loss} ({t.space})" for t in task.losses)
            print(f"{name}: {losses}{'; the decoder trains too' if task.trains_decoder else ''}")
        print("\nGradients of the pixel loss (--gradient of train), which run compares as arms:")
        for name, meaning in MEANING.items():
            print(f"{name}: {meaning}")
    elif isinstance(command, Preview):
        _preview(command)
    elif isinstance(command, Protocol):
        from bench.tasks.publish import compare

        compare(command)
    elif isinstance(command, TrainSettings):
        from bench.tasks.training.train import Training

        Training(command).run()
    else:
        from bench.tasks.training.restore import restore_video

        restore_video(command.run, command.video, command.out, command.frames, command.cpu)


def _preview(command: Preview) -> None:
    if command.out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got '{command.out.name}'.")
    if not command.seeds or command.shown < 1:
        raise ValueError("A contact sheet needs at least one of --seeds and --shown of at least 1.")
    task = task_by_name(command.task, command.folder)
    path = contact_sheet(task, command.out, command.seeds, command.frames, *command.size, command.shown)
    print(f"Written: {path.name}")


def cli(arguments: list[str] | None = None) -> None:
    """The command line; bad input ends it with one sentence."""
    run_main(main, Command, __doc__, {FloatingPointError: ""}, arguments)


if __name__ == "__main__":
    cli()
