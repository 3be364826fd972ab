"""Look at the end tasks: ``python -m bench.tasks preview --task driving --out sheet.png``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.tasks import TASKS, task_by_name
from bench.tasks.preview import contact_sheet


@dataclass
class Preview:
    """A contact sheet: one row a seed, the condition on the left, the target on the right."""

    task: str
    """One of super-resolution, artifact-removal, inpainting, inpainting-objects, driving."""
    out: Path
    """The PNG to write."""
    folder: Path | None = None
    """Real footage: a folder of videos (super-resolution, inpainting), or condition/ and target/ in it (the rest)."""
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
    """The tasks, their losses and whether the decoder trains."""


Command = Annotated[Preview, tyro.conf.subcommand("preview")] | Annotated[List, tyro.conf.subcommand("list")]


def main(command: Preview | List) -> None:
    if isinstance(command, List):
        for name, task in TASKS.items():
            losses = " + ".join(f"{t.weight:g} {t.loss} ({t.space})" for t in task.losses)
            print(f"{name}: {losses}{'; the decoder trains too' if task.trains_decoder else ''}")
        return
    if command.out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got '{command.out.name}'.")
    if not command.seeds or command.shown < 1:
        raise ValueError("A contact sheet needs at least one of --seeds and --shown of at least 1.")
    task = task_by_name(command.task, command.folder)
    path = contact_sheet(task, command.out, command.seeds, command.frames, *command.size, command.shown)
    print(f"Written: {path.name}")


def cli(arguments: list[str] | None = None) -> None:
    """The command line; bad input ends it with one sentence."""
    try:
        main(tyro.cli(Command, description=__doc__, args=arguments))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    cli()
