"""What a GPU can say in some minutes: ``python -m bench.gpu --minutes 9 --out DIR`` (``docs/gpu.md``).

One process, the most telling rows first; every result is written at once, so that an interruption loses one case. The
budget of minutes is binding. ``--train`` spends the minutes that are left on an embedded decoder. ``--dry-run``
rehearses all of it on a CPU, on a few pixels.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from bench.gpu import card
from bench.gpu.clock import at_most
from bench.gpu.compare import reason, the_row
from bench.gpu.measure import give_back
from bench.gpu.rows import rows, tiny
from bench.gpu.session import Session
from suite.command_line import run_main
from suite.records import ROOT

CARD_SECONDS = 60
TESTS = "tests/chopgrad/test_cuda.py"
TEST_SECONDS = 240
START_SECONDS = 20
"""Until a training has imported what it needs."""
PYTHON_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""Of the processes that are started."""
SPARE_SECONDS = 8
"""Kept at the end, to write what there is."""


@dataclass
class Config:
    """Settings of the measurement."""

    minutes: float = 9.0
    """What all of it may take, the tests included."""
    out: Path = Path("runs/gpu")
    """Folder of the records, the log and the archive to send."""
    only: tuple[str, ...] = ()
    """Only these rows, in their order (none given: all; see docs/gpu.md)."""
    tests: bool = True
    """Also run the tests that need a GPU."""
    measure: bool = True
    """False: only train."""
    train: Literal["wan2.1", "cogvideox"] | None = None
    """Afterwards, train this embedded decoder for the minutes that are left (weights/train.py)."""
    training: str = ""
    """With --train: more words for weights/train.py, such as "--data training.zip --clip-height 160"."""
    dry_run: bool = False
    """On the CPU, with tiny sizes."""


def main(config: Config) -> None:
    check(config)
    session = Session(config.out, 60 * config.minutes - SPARE_SECONDS, "cpu" if config.dry_run else "cuda")
    session.say(f"{session.made_by['device']}, PyTorch {session.made_by['torch']}, commit {session.made_by['commit']}")
    try:
        if config.measure:
            measure_all(session, config)
        if config.train is not None:
            train(session, config)
    finally:
        archive = Path(shutil.make_archive(str(session.folder), "zip", session.folder.parent, session.folder.name))
        session.say(f"Send {archive.name} ({archive.stat().st_size / 2**20:.1f} MiB), or commit the folder.")


def measure_all(session: Session, config: Config) -> None:
    """The card, then row after row; the tests after the two rows that matter most."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if not config.dry_run else 80.0
    chosen = [row for row in rows(memory) if not config.only or row.name in config.only]
    if config.dry_run:
        chosen = tiny(chosen)
    if not config.only or "card" in config.only:
        the_card(session)
    for number, row in enumerate(chosen):
        if number == 2 and config.tests:
            run_tests(session)
        the_row(session, row)
        give_back(host=False)
    if len(chosen) <= 2 and config.tests:
        run_tests(session)


def check(config: Config) -> None:
    """Bad settings are told before any work."""
    known = ["card", *(row.name for row in rows(1000.0))]
    for name in config.only:
        if name not in known:
            raise ValueError(f"--only: there is no row '{name}'; pass some of {', '.join(known)}.")
    if not 0 < config.minutes < float("inf"):
        raise ValueError(f"--minutes must be positive, got {config.minutes}.")
    if config.training and config.train is None:
        raise ValueError("--training goes with --train.")
    if not config.measure and config.train is None:
        raise ValueError("--no-measure leaves nothing to do: add --train wan2.1 or --train cogvideox.")
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device: run it on a machine with one, or rehearse with --dry-run.")
    if not config.dry_run and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16, in which everything here is measured: use a "
            "card of the Ampere generation or later."
        )


def the_card(session: Session) -> None:
    """Transfers, pinning and convolutions: what every other number rests on."""
    if session.has("card"):
        return
    small = session.device == "cpu"
    try:
        with at_most(min(CARD_SECONDS, session.clock.left)):
            metrics = card.host() | card.transfers(session.device, 2**20 if small else card.GIB)
            shapes = ((8, 2, 16, 16),) if small else card.CONVOLUTIONS
            metrics["convolutions"] = card.convolutions(session.device, shapes)
            metrics |= {} if small else card.fast_pinning(30)
    except Exception as error:  # the rows can do without
        session.say(f"card: {reason(error)}")
        return
    session.clock.pinning = metrics["pinning_gib_per_s"]
    session.write("card", {"row": "card"}, metrics)
    session.say("card: " + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items() if isinstance(v, float)))
    give_back(host=True)


def run_tests(session: Session) -> None:
    """The tests that need a GPU, in processes of their own."""
    left = min(TEST_SECONDS, session.clock.left)
    if session.has("tests") or left <= 0:
        return
    command = [sys.executable, "-m", "pytest", TESTS, "-v", "-p", "no:cacheprovider", "-rfE"]
    if session.device == "cpu":
        command.append("--collect-only")
    elif find_spec("xdist"):
        command += ["-n", "6", "--dist", "worksteal"]
    give_back(host=True)
    with (session.folder / "tests.txt").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PYTHON_PATH}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too, which would disturb the next row
            process.wait()
        log.seek(0)
        text = log.read().replace(str(ROOT), ".")
    (session.folder / "tests.txt").write_text(text)
    counts = counts_of(text)
    if counts:
        session.write("tests", {"row": "tests", "command": f"pytest {TESTS}"}, {"exit_code": code, **counts})
    session.say(f"tests: {counts or 'no result'}, exit code {code}" + (" (stopped)" if code is None else ""))


def counts_of(text: str) -> dict[str, int]:
    """Outcomes in what ``pytest -v`` printed; of a run that was stopped too, and how many it had not come to."""
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    if found:
        return found
    words = Counter(re.findall(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", text))
    if not words:
        return {}
    there = re.search(r"(\d+) items", text)
    unfinished = {"unfinished": int(there[1]) - words.total()} if there else {}
    return {word.lower(): n for word, n in words.items()} | unfinished


def train(session: Session, config: Config) -> None:
    """``weights/train.py`` for the minutes that are left; it resumes from its own checkpoint."""
    minutes = (session.clock.left - START_SECONDS) / 60
    if minutes <= 0:
        session.say("training: no time is left")
        return
    run = config.out / f"train-{config.train}"
    command = [sys.executable, str(ROOT / "weights" / "train.py"), "--model", str(config.train)]
    command += ["--device", session.device]
    command += ["--minutes", f"{minutes:.2f}", "--run", str(run.resolve()), "--out", str(run.resolve() / "model")]
    session.say(f"training {config.train} for {minutes:.1f} min")
    done = subprocess.run([*command, *shlex.split(config.training)], env=os.environ | {"PYTHONPATH": PYTHON_PATH})
    session.say(f"training ended with exit code {done.returncode}; it lies in {run.name}/")
    if done.returncode:
        raise RuntimeError(f"weights/train.py ended with exit code {done.returncode}")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {RuntimeError: ""})
