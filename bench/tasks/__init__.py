"""The end tasks of the paper (arXiv 2603.17812, Sec. 4), and a gentle one: seeded pairs of condition and target.

Procedural by default; ``task_by_name(name, folder)`` takes real footage instead.
``python -m bench.tasks preview --task driving --out sheet.png`` shows what a task looks like.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.tasks.artifact_removal import ArtifactRemoval
from bench.tasks.deblurring import Deblurring
from bench.tasks.driving import Driving
from bench.tasks.inpainting import Inpainting
from bench.tasks.super_resolution import SuperResolution
from bench.tasks.task import LossTerm, Pair, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SuperResolution(),
        ArtifactRemoval(),
        Inpainting(),
        Inpainting(region="object", name="inpainting-objects"),
        Driving(),
        Deblurring(),
    )
}


def task_by_name(name: str, folder: Path | None = None) -> Task:
    """A task of ``TASKS``, on real footage where ``folder`` is given.

    Raises:
        ValueError: unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task '{name}': pass one of {', '.join(TASKS)}.")
    return dataclasses.replace(TASKS[name], folder=folder) if folder else TASKS[name]


__all__ = ["TASKS", "LossTerm", "Pair", "Task", "task_by_name"]
