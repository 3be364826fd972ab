"""The main job: ``python -m bench`` (``tox -e bench``).

Gradient bias of both embedded decoders on a real clip; the gradient error of every strategy and baseline; peak memory
(each case in a fresh process); time (pytest-benchmark); the planner's predictions beside the measurements; then tables,
figures and whether the targets were reached. Finished cases are kept: run it again after an interruption. On a machine
with a GPU ``--full`` measures the published architectures, the most useful cases first; ``--published`` measures them
without one, on short and small videos, in hours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch

from bench.cases import Case, measurable, videos
from bench.error import measure_errors
from bench.memory import keep, peak
from bench.page.figure import curves
from bench.page.frontier import frontier
from bench.page.tables import report
from bench.predict import affordable, keep_predictions
from bench.selection import Selection, has_error, is_predicted, is_timed, stages
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT, provenance
from suite.vaes import EMBEDDED

Item = TypeVar("Item")
Phase = Literal["bias", "error", "memory", "time", "predict"]


@dataclass
class Config:
    """Settings of the benchmark."""

    full: bool = False
    """The published architectures (random weights, bfloat16) instead of the embedded decoders; needs a GPU."""
    published: bool = False
    """The published architectures (random weights, float32) on the CPU: bench-published.md, records in published/."""
    limit_gib: float = 12.0
    """With --published: what is predicted to take more memory is not tried."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    vaes: tuple[str, ...] = ()
    """Only these: wan2.1, wan2.2 (with --full or --published), cogvideox."""
    sizes: tuple[str, ...] = ()
    """Only these, as HEIGHTxWIDTH in pixels; with --full any size will do."""
    frames: tuple[int, ...] = ()
    """Only these numbers of frames; with --full any 1 + 4 k will do."""
    losses: tuple[str, ...] = ()
    """None given: mse; with --full mse and lpips."""
    minutes: float | None = None
    """Start no new case after so many minutes; what is missing is measured when it is run again."""
    rounds: int = 3
    """Timed repetitions of each case."""
    phases: tuple[Phase, ...] = ("bias", "error", "memory", "time", "predict")
    """What to do; predictions need no GPU and may be made elsewhere."""
    out: Path = ROOT / "runs" / "bench"
    """Folder of the records, and of tables and figures (bench-[full-]<device>*); those of the project: results."""

    @property
    def selection(self) -> Selection:
        return Selection(self.full, self.device, self.vaes, self.sizes, self.frames, self.losses, self.published)

    @property
    def records(self) -> Path:
        return self.out / self.selection.folder


def main(config: Config) -> None:
    deadline = float("inf") if config.minutes is None else time.time() + 60 * config.minutes
    check(config)
    todo = stages(config.selection)
    failures: list[str] = []
    made_by = provenance(config.device if "memory" in config.phases or "time" in config.phases else "cpu")
    if "bias" in config.phases and not (config.full or config.published):
        failures += bias(config)
    everything = [case for stage in todo for case in stage]
    # Memory and errors on a CPU do not disturb each other, but several full-size decoders would not fit.
    at_once = 1 if made_by["cuda"] or config.published else os.cpu_count() or 1
    if "error" in config.phases:
        compared = [c for c in everything if has_error(c)]
        together = [[c for c in compared if c.video == video] for video in videos(compared)]

        def error(same_video: list[Case]) -> None:
            measure_errors(same_video, config.records / "gradient_error", made_by)

        failures += in_parallel(error, together, at_once, deadline, "gradient error")
    checked: set[str] = set()
    for number, stage in enumerate(todo):
        if config.published:  # before anything is tried
            failures += predict(config, stage, deadline)
        if "memory" in config.phases:
            measured = tried(config, [c for c in stage if measurable(c)])
            memory = partial(keep, peak, folder=config.records / "memory", made_by=made_by)
            failures += in_parallel(memory, measured, at_once, deadline, "peak memory")
        if not config.published:
            failures += measure_time(config, number, stage, made_by["command"], deadline, checked)
    if config.published:  # peaks are exact, and all there before the clock starts
        for number, stage in enumerate(todo):
            failures += measure_time(config, number, stage, made_by["command"], deadline, checked)
    else:
        failures += predict(config, everything, deadline)
    kind = "full-" if config.full else ""
    name = "bench-published" if config.published else f"bench-{kind}{torch.device(config.device).type}"
    text = report(config.records, everything, name)
    (config.out / f"{name}.md").write_text(text)
    curves(config.records, everything, config.out / f"{name}.png")
    frontier(config.records, everything, config.out / f"{name}-frontier.png")
    print(text)
    print(f"Written: {name}.md, {name}.png and {name}-frontier.png in {config.out.name}/, one record per case beside.")
    if failures:
        raise RuntimeError(f"{len(failures)} failed, the others are in the report: {'; '.join(failures)}")


def check(config: Config) -> None:
    """Bad settings are told before any work."""
    device = torch.device(config.device)
    if config.published and (config.full or device.type != "cpu"):
        raise ValueError(
            "--published measures the full-size decoders on the CPU: pass --device cpu and leave out --full, or pass "
            "--full alone on a machine with a GPU."
        )
    measures = {"memory", "time"} & set(config.phases)
    if device.type == "cuda" and measures and not torch.cuda.is_available():
        raise ValueError(
            f"--device {config.device} was asked for, but this PyTorch sees no CUDA device: pass --device cpu."
        )
    if config.full and device.type != "cuda":
        raise ValueError(
            "--full measures the full-size decoders, which would take days on a CPU: run it on a machine with a GPU, "
            "or leave it out to measure the embedded decoders."
        )
    if not config.limit_gib > 0:
        raise ValueError(f"--limit-gib must be positive, got {config.limit_gib}.")
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {config.rounds}.")
    if config.minutes is not None and not config.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {config.minutes}.")


def bias(config: Config) -> list[str]:
    """``analysis/gradient_bias.py`` on few crops; its own default has more, and is kept elsewhere."""
    on_cuda = torch.device(config.device).type == "cuda"
    at_once = 1 if on_cuda else os.cpu_count() or 1
    threads = {} if on_cuda else {"OMP_NUM_THREADS": "1"}  # one process a core
    tables: dict[str, str] = {}

    def one(vae: str) -> None:
        result = (config.out / "gradient_bias" / f"{vae}-bench.json").resolve()
        command = [sys.executable, "analysis/gradient_bias.py", "--vae", vae, "--crops", "2", "--losses", "mse"]
        tables[vae] = run([*command, "--device", config.device, "--out", str(result)], quiet=True, **threads)

    failures = in_parallel(one, config.vaes or tuple(EMBEDDED), at_once, float("inf"), "gradient bias")
    for vae, table in sorted(tables.items()):
        print(f"== gradient bias, {vae}\n{table}", flush=True)
    return failures


def in_parallel(
    work: Callable[[Item], object], items: Sequence[Item], at_once: int, deadline: float, description: str
) -> list[str]:
    """Work that starts a fresh process for each item, several at once; no new one after the deadline.

    Returns what went wrong: one case that fails shall not cost the others.
    """
    failures: list[str] = []

    def one(item: Item) -> None:
        if time.time() < deadline:
            work(item)

    with ThreadPoolExecutor(at_once) as pool:
        jobs = [pool.submit(one, item) for item in items]
        try:
            for job in track(as_completed(jobs), description, total=len(jobs)):
                if (failure := job.exception()) is not None:
                    failures.append(f"{description}: {failure}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def tried(config: Config, cases: list[Case]) -> list[Case]:
    """With ``--published`` those that fit, by the prediction; the others are told."""
    if not config.published:
        return cases
    fitting = affordable(cases, config.records / "prediction", config.limit_gib * 2**30)
    if skipped := [c.name for c in cases if c not in fitting]:
        print(f"Not predicted to fit into {config.limit_gib:g} GiB, so not tried: {', '.join(skipped)}", flush=True)
    return fitting


def predict(config: Config, cases: Sequence[Case], deadline: float) -> list[str]:
    if "predict" not in config.phases:
        return []
    # On a GPU at full size: only beside what was measured. A card waits for no prediction that nobody compares.
    wanted = [c for c in cases if is_predicted(c)]
    wanted = [c for c in wanted if not config.full or (config.records / "memory" / f"{c.name}.json").exists()]
    same_videos = [[c for c in wanted if c.video == video] for video in videos(wanted)]
    prediction = partial(keep_predictions, folder=config.records / "prediction", made_by=provenance("cpu"))
    return in_parallel(prediction, same_videos, os.cpu_count() or 1, deadline, "prediction")


def measure_time(
    config: Config, number: int, stage: Sequence[Case], command: str, deadline: float, checked: set[str]
) -> list[str]:
    """Time of a stage's cases. The gradients of its VAEs are checked first, and the VAEs then added to ``checked``."""
    wanted = "time" in config.phases and any(is_timed(c) and measurable(c) for c in stage)
    if not wanted or time.time() >= deadline:
        return []
    print("== time", flush=True)
    try:
        run(
            [sys.executable, "-m", "pytest", "bench/test_time.py", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
            + ["--benchmark-columns=median,min,rounds", "--benchmark-sort=name"],
            CHOPGRAD_BENCH_SELECTION=config.selection.to_json(),
            CHOPGRAD_BENCH_STAGE=str(number),
            CHOPGRAD_BENCH_ROUNDS=str(config.rounds),
            CHOPGRAD_BENCH_RESULTS=str(config.records.resolve()),
            CHOPGRAD_BENCH_COMMAND=command,
            CHOPGRAD_BENCH_DEADLINE=str(deadline),
            CHOPGRAD_BENCH_CHECKED=",".join(sorted(checked)),
        )
    except RuntimeError as error:
        return [f"time: {error}"]
    if time.time() < deadline:  # else some may have been skipped
        checked |= {c.vae for c in stage if is_timed(c) and measurable(c)}
    return []


def run(command: list[str], quiet: bool = False, **environment: str) -> str:
    """What the command printed, where it is ``quiet``; else it prints for itself."""
    pipe = subprocess.PIPE if quiet else None
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True)
    if done.returncode:
        print(done.stderr or "", file=sys.stderr)
        raise RuntimeError(f"{' '.join(command[1:4])} ended with exit code {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    run_main(main, Config, __doc__, {RuntimeError: ""})
