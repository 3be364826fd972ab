"""The protocol run, and what people look at: tables, figure and picture grids."""

from __future__ import annotations

import torch

from bench.tasks.comparison import results_of
from bench.tasks.data.pairs import from_bytes
from bench.tasks.evaluate import test_clips
from bench.tasks.protocol import Protocol, restored_of, run
from bench.tasks.tables import figure, overview, picture_grid, table
from bench.tasks.training.arms import MEANING
from bench.tasks.training.train import Training
from suite.records import ROOT

SHOWN = ("latent", "isolated", "chop-1", "exact")
ROWS = (0, 1, 2, 3)


def compare(protocol: Protocol) -> None:
    """Run what is missing, then ``publish``."""
    run(protocol)
    publish(protocol)


def publish(protocol: Protocol) -> None:
    """Write ``<task>.md``, ``<task>.png``, ``differences.png`` and ``README.md`` from the records that are there."""
    assert protocol.out and protocol.tasks
    folder = protocol.out
    found = results_of(folder)
    for results in found:
        _grid(protocol, results.task, [r for arm in results.arms for r in results.by_arm[arm]])
        (folder / f"{results.task}.md").write_text(table(results))
    figure(found, folder / "differences.png")
    text = overview(found, f"tox -e tasks{' -- --full' if protocol.full else ''}")
    (folder / "README.md").write_text(text)
    print(text)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder.name
    print(f"Written: README.md, one .md and .png a task, differences.png in {shown}/")


def _grid(protocol: Protocol, task: str, records: list) -> None:
    """The picture grid of a task, where its restored clips are still on this machine; else the old one stays."""
    assert protocol.out
    videos: dict[str, torch.Tensor] = {}
    for record in records:
        arm = record.settings["arm"]
        if arm in SHOWN and record.settings["seed"] == 0:
            restored = restored_of(record)
            if restored is not None:
                videos[MEANING[arm]] = from_bytes(restored)
    if not videos:
        return
    training = Training(protocol.training(task, "latent", 0, ROOT / "runs" / "tasks" / "trained", None))
    clips = test_clips(training, protocol.test_clips or 0)
    batch = clips.batch(range(len(clips)))
    videos = {"input": from_bytes(batch["condition"]), **videos, "target": from_bytes(batch["target"])}
    picture_grid(protocol.out / f"{task}.png", task, [k for k in ROWS if k < len(clips)], videos)
