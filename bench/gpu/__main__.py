"""What a GPU can say in some minutes: ``python -m bench.gpu --minutes 9 --out DIR`` (``docs/gpu.md``).

One process, the most telling rows first; every result is written at once, so that an interruption loses one case. The
budget of minutes is binding. ``--train`` spends the minutes on an embedded decoder instead. ``--dry-run`` rehearses
all of it on a CPU, on a few pixels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.cases import Inside, Method, label, slug
from bench.gpu import card
from bench.gpu.clock import Clock, OutOfTime, at_most
from bench.gpu.measure import Run, Video, difference, give_back, measure, repeated
from bench.gpu.rows import Call, Row, rows, tiny
from bench.memory import is_out_of_memory
from chopgrad import Exact
from suite.command_line import run_main
from suite.records import ROOT, provenance, read_record, write_record

TEST_SECONDS = 150
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
    train: Literal["wan2.1", "cogvideox"] | None = None
    """Train this embedded decoder for the minutes instead of measuring."""
    data: Path | None = None
    """With --train: the file that weights/train.py --pack wrote."""
    dry_run: bool = False
    """On the CPU, with tiny sizes."""


class Session:
    """One card, its clock, and where results go."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = "cpu" if config.dry_run else "cuda"
        self.dtype = "float32" if config.dry_run else "bfloat16"
        self.clock = Clock(60 * config.minutes - SPARE_SECONDS)
        self.made_by = provenance(self.device)
        name = "cpu" if config.dry_run else self.made_by["device"]
        self.folder = config.out / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.started:6.1f} s  {text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def write(self, name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
        write_record(self.folder / f"{name}.json", settings, metrics, self.made_by)

    def has(self, name: str) -> bool:
        """Whether an earlier run of the same commit wrote it."""
        try:
            old = read_record(self.folder / f"{name}.json")
        except ValueError:
            return False
        return old.provenance.get("commit") == self.made_by["commit"] is not None


def main(config: Config) -> None:
    check(config)
    if config.train is not None:
        train(config)
        return
    session = Session(config)
    session.say(f"{session.made_by['device']}, PyTorch {session.made_by['torch']}, commit {session.made_by['commit']}")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if not config.dry_run else 80.0
    chosen = [row for row in rows(memory) if not config.only or row.name in config.only]
    if config.dry_run:
        chosen = tiny(chosen)
    if not config.only or "card" in config.only:
        the_card(session)
    for number, row in enumerate(chosen):
        if number == 2 and config.tests:  # after the two rows that matter most
            run_tests(session)
        the_row(session, row)
        give_back(host=False)
    if len(chosen) <= 2 and config.tests:
        run_tests(session)
    archive = shutil.make_archive(str(session.folder), "zip", session.folder.parent, session.folder.name)
    session.say(f"Send {Path(archive).name} ({Path(archive).stat().st_size / 2**20:.1f} MiB), or commit the folder.")


def check(config: Config) -> None:
    """Bad settings are told before any work."""
    known = ["card", *(row.name for row in rows(1000.0))]
    for name in config.only:
        if name not in known:
            raise ValueError(f"--only: there is no row '{name}'; pass some of {', '.join(known)}.")
    if not 0 < config.minutes < float("inf"):
        raise ValueError(f"--minutes must be positive, got {config.minutes}.")
    if config.data is not None and config.train is None:
        raise ValueError("--data is for --train.")
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device: run it on a machine with one, or rehearse with --dry-run.")


def the_card(session: Session) -> None:
    """Transfers, pinning and convolutions: what every other number rests on."""
    if session.has("card"):
        return
    small = session.config.dry_run
    with at_most(min(60, session.clock.left)):
        metrics = card.host() | card.transfers(session.device, 2**20 if small else card.GIB)
        metrics["convolutions"] = card.convolutions(session.device, ((8, 2, 16, 16),) if small else card.CONVOLUTIONS)
        metrics |= {} if small else card.fast_pinning(30)
    session.clock.pinning = metrics["pinning_gib_per_s"]
    session.write("card", {"row": "card"}, metrics)
    session.say("card: " + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items() if isinstance(v, float)))
    give_back(host=True)


def the_row(session: Session, row: Row) -> None:
    """All methods of a row, each a record."""
    clock, names = session.clock, {method: name_of(row, *method) for method in row.methods}
    if all(session.has(name) for name in names.values()):
        return
    try:
        with at_most(clock.left):
            video = Video(row, session.dtype, session.device)
            forward = min(card.clock(video.forward, session.device) for _ in range(2))
            exact = in_float32(video) if row.error else None
    except OutOfTime:
        session.say(f"{row.name}: no time is left")
        return
    except Exception as error:
        session.say(f"{row.name}: {reason(error)}")
        return
    clock.learn(row.vae, row.megapixels, 3 * forward)
    reference: tuple[Run, str, Tensor] | None = None
    for (call, method), name in names.items():
        calls = 1 + row.rounds * (1 if reference is None else 2) + row.repeats
        expected = clock.estimate(row.vae, row.megapixels, calls, method)
        if expected > clock.left:
            session.say(f"{row.name}, {call} {label(method)}: would take {expected:.0f} s, {clock.left:.0f} s are left")
            continue
        settings = replace(row.case(method, session.dtype, session.device)).settings() | {
            "row": row.name, "call": call, "channels_last": row.channels_last, "rounds": row.rounds,
        }  # fmt: skip
        metrics: dict[str, Any] = {"forward_s": forward, "expected_s": expected}
        run = video.run(call, method)
        try:
            with at_most(min(clock.left, 3 * expected + 30)):
                found, gradient = measure(run, reference and reference[0], row.rounds, session.device)
                metrics |= found
                if row.repeats:
                    metrics |= repeated(run, row.repeats, session.device)
            metrics |= {"out_of_memory": False, "reference": reference[1] if reference else None}
            if exact is not None:
                metrics["error_to_float32"] = difference(gradient, exact)
            if reference is not None:
                metrics["difference_from_reference"] = difference(gradient, reference[2])
            clock.learn(row.vae, row.megapixels, min([*found["seconds"], found["first_s"] - found.get("pinning_s", 0)]))
            reference = reference or (run, label(method), gradient)
            session.write(name, settings, metrics)
            session.say(f"{row.name}, {call} {label(method)}: {summary(metrics)}")
        except OutOfTime:
            session.say(f"{row.name}, {call} {label(method)}: stopped, its time was over")
        except Exception as error:
            if is_out_of_memory(error):
                session.write(name, settings, metrics | {"out_of_memory": True})
            session.say(f"{row.name}, {call} {label(method)}: {reason(error)}")
        gradient = found = None  # type: ignore[assignment]
        give_back(host=host_is_full())


def in_float32(video: Video) -> Tensor:
    """The exact gradient of the same weights, latents and target in float32 (and not TensorFloat-32)."""
    subject, dtype = video.subject, video.subject.dtype
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    latents, target = subject.latents, subject.target
    try:
        nn.Module.float(subject.decoder.vae)  # diffusers' own warns
        subject.latents, subject.target = latents.float(), target.float()
        return subject.run(Inside("frame", Exact(pieces=True, every=1)))[1].cpu()
    finally:
        nn.Module.to(subject.decoder.vae, dtype)  # bfloat16 comes back as it was
        subject.latents, subject.target = latents, target
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        give_back(host=False)


def name_of(row: Row, call: Call, method: Method) -> str:
    return f"{row.name}-{call.replace('_', '-')}-{slug(method)}"


def reason(error: Exception) -> str:
    """Out of memory, or what else went wrong, in a line."""
    first = (str(error).splitlines() or [""])[0][:200]
    return "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {first}"


def summary(metrics: dict[str, Any]) -> str:
    words = [f"first {metrics['first_s']:.2f} s"]
    if metrics["seconds"]:
        words.append(f"then {min(metrics['seconds']):.2f} s")
    if metrics.get("time_ratio") is not None:
        words.append(f"ratio {metrics['time_ratio']:.2f}")
    for key in ("allocated_peak_bytes", "reserved_peak_bytes", "pinned_peak_bytes"):
        if key in metrics:
            words.append(f"{key.removesuffix('_peak_bytes')} {metrics[key] / 2**30:.2f} GiB")
    for key in ("every", "error_to_float32", "difference_from_reference", "repeat_difference"):
        if metrics.get(key) is not None:
            words.append(f"{key} {metrics[key]:.3g}")
    return ", ".join(words)


def host_is_full() -> bool:
    """Whether what PyTorch keeps pinned is more than a third of the host's memory; pinning it again takes long."""
    if not torch.cuda.is_available():
        return False
    kept, there = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0), card.host()["host_bytes"]
    return there is not None and kept > there / 3


def run_tests(session: Session) -> None:
    """The tests that need a GPU, in processes of their own."""
    left = min(TEST_SECONDS, session.clock.left)
    command = [sys.executable, "-m", "pytest", "tests/chopgrad/test_cuda.py", "-q", "-p", "no:cacheprovider", "-rfE"]
    if session.config.dry_run:
        command.append("--collect-only")
    else:
        command += ["-n", "6", "--dist", "worksteal"]
    give_back(host=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True, text=True,
            timeout=max(left, 1),
        )  # fmt: skip
        text, code = done.stdout + done.stderr[-2000:], done.returncode
    except subprocess.TimeoutExpired as error:
        text, code = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {left:.0f} s", None
    (session.folder / "tests.txt").write_text(text.replace(str(ROOT), "."))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    settings = {"row": "tests", "command": "pytest tests/chopgrad/test_cuda.py"}
    session.write("tests", settings, {"exit_code": code, **counts})
    session.say(f"tests: {counts or 'no result'}, exit code {code}")


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def train(config: Config) -> None:
    """``weights/train.py`` for the minutes that there are; it resumes from its own checkpoint."""
    run = config.out / f"train-{config.train}"
    command = [sys.executable, str(ROOT / "weights" / "train.py"), "--model", str(config.train)]
    command += ["--minutes", str(config.minutes), "--run", str(run), "--out", str(run / "model")]
    if config.data is not None:
        command += ["--data", str(config.data)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": python_path()})
    if done.returncode:
        raise RuntimeError(f"weights/train.py ended with exit code {done.returncode}")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {RuntimeError: ""})
