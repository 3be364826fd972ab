"""The committed comparison: every task, arm and seed, from the same start, on the same clips in the same order.

For each seed a fresh backbone is trained in latent space (the warm-up, as published models were); every arm then
fine-tunes a copy of it for the same number of steps. Records go to ``<out>/<task>-<arm>-seed<k>.json``; what is
finished is kept, an interrupted training goes on at its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.tasks import task_by_name
from bench.tasks.data.pairs import vae_key
from bench.tasks.evaluate import autoencoded_clips, restored_clips, scores, test_clips
from bench.tasks.training.arms import ARMS, CONTROLS, arm_by_name
from bench.tasks.training.settings import TrainSettings
from bench.tasks.training.train import Training
from chopgrad.memory import PeakMemory
from suite.cases import run_case
from suite.records import ROOT, Record

TASK_NAMES = ("super-resolution", "artifact-removal", "inpainting", "driving")
"""In the order of the paper's Tables 1 to 4."""
COMPARED = tuple(name for name in ARMS if name not in ("full", "exact-offload"))
"""The other two have the gradient of ``exact``, so their training would be the same again; ``full`` is timed."""
SMALL_ARMS = ("latent", "isolated", "chop-1")
REFERENCES = ("input", "autoencoder")
CODE = ("bench/tasks/**/*.py", "bench/baselines.py", "chopgrad/*.py", "chopgrad/decoders/*.py", "suite/losses.py",
        "suite/motion.py", "suite/metrics/*.py", "suite/networks/*.py")  # fmt: skip
NOT_CODE = ("tables.py", "comparison.py", "publish.py", "protocol.py", "restore.py", "preview.py", "pictures.py",
            "testing.py", "audit.py", "audit_command.py", "clip.py", "__main__.py")  # fmt: skip


@dataclass
class Protocol:
    """Compare the arms of the end tasks: one record a task, arm and seed, a table and pictures a task."""

    full: bool = False
    """The committed protocol: all tasks and arms, five seeds."""
    tasks: tuple[str, ...] | None = None
    """Some of super-resolution, artifact-removal, inpainting, inpainting-objects, driving, deblurring.
    None: inpainting, or the first three and driving with --full."""
    arms: tuple[str, ...] | None = None
    """Some of those that ``python -m bench.tasks list`` names. None: latent, isolated, chop-1; with --full all."""
    seeds: int | None = None
    """Seeds of an arm. None: 2, or 5 with --full."""
    folder: Path | None = None
    """Real footage instead of generated clips, as for ``train``."""
    frames: int | None = None
    """Frames of a clip. None: 17, or 25 with --full."""
    size: tuple[int, int] = (32, 32)
    """Height and width of a clip in pixels."""
    clips: int | None = None
    """Training clips of a task. None: 16, or 256 with --full."""
    test_clips: int | None = None
    """Clips that are scored. None: 4, or 8 with --full."""
    warm_up: int | None = None
    """Steps of the warm-up in latent space, of 8 clips. None: 100, or 400 with --full."""
    steps: int | None = None
    """Steps of every arm, of 2 clips. None: 10, or 40 with --full."""
    rate: float = 5e-4
    """Learning rate of every arm."""
    perceptual_stride: int = 4
    """LPIPS and DISTS see every so-many-th frame of a group, in turn."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """no or bf16, for training and restoring alike."""
    fvd_seeds: int = 1
    """FVD is computed for so many seeds: on a CPU it costs more than all other metrics."""
    cpu: bool = False
    """Leave a GPU alone."""
    out: Path | None = None
    """Folder of the records. None: runs/tasks/small, or results/tasks with --full."""

    def __post_init__(self) -> None:
        small: Mapping[str, Any] = {
            "tasks": ("inpainting",), "arms": SMALL_ARMS, "seeds": 2, "frames": 17, "clips": 16, "test_clips": 4,
            "warm_up": 100, "steps": 10, "out": ROOT / "runs" / "tasks" / "small",
        }  # fmt: skip
        full: Mapping[str, Any] = {
            "tasks": TASK_NAMES, "arms": COMPARED, "seeds": 5, "frames": 25, "clips": 256, "test_clips": 8,
            "warm_up": 400, "steps": 40, "out": ROOT / "results" / "tasks",
        }  # fmt: skip
        for name, value in (full if self.full else small).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.arms and self.seeds and self.test_clips and self.warm_up
        for arm in self.arms:
            arm_by_name(arm)
        if "latent" not in self.arms:
            raise ValueError("Arms are compared with 'latent', which --arms lacks: add it.")
        if min(self.seeds, self.warm_up) < 1 or self.test_clips < 4:
            raise ValueError(
                f"At least one seed, one step of warm-up and four test clips are needed, got {self.seeds}, "
                f"{self.warm_up} and {self.test_clips}."
            )

    def arms_of(self, task: str) -> list[str]:
        """Those that differ from others in this task."""
        assert self.arms
        return [arm for arm in self.arms if arm not in CONTROLS or task_by_name(task).trains_decoder]

    def training(self, task: str, arm: str, seed: int, runs: Path, start: Path | None) -> TrainSettings:
        """The settings of one run; without ``start``, of the warm-up."""
        assert self.frames and self.clips and self.steps and self.warm_up
        fine = start is not None
        settings = TrainSettings(
            task=task, arm=arm, seed=seed, start=start, folder=self.folder, frames=self.frames, size=self.size,
            clips=self.clips, steps=self.steps if fine else self.warm_up, batch=2 if fine else min(8, self.clips),
            rate=self.rate if fine else 1e-3, vae="cogvideox" if task == "super-resolution" else "wan2.1",
            mixed_precision=self.mixed_precision, perceptual_stride=self.perceptual_stride, samples=0, cpu=self.cpu,
            checkpoint_every=16 if fine else 200, out=runs, cache=ROOT / "runs" / "tasks" / "clips",
        )  # fmt: skip
        key = json.dumps([settings.described(), code_fingerprint()], sort_keys=True)
        name = f"{task}-{arm if fine else 'warm-up'}-seed{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        return dataclasses.replace(settings, out=runs / name)


def run(protocol: Protocol) -> list[Record]:
    """All records, those of earlier runs included. The seed is the outermost loop: stopped early, all arms have
    equally many."""
    protocol.check()
    assert protocol.tasks and protocol.arms and protocol.seeds and protocol.out
    runs = ROOT / "runs" / "tasks" / "trained"
    console = Console(stderr=True)
    records = []
    for task in protocol.tasks:  # what cannot work shall fail before anything is trained
        Training(protocol.training(task, "latent", 0, runs, None))
    for seed in range(protocol.seeds):
        for task in protocol.tasks:
            warm = protocol.training(task, "latent", seed, runs, None)
            if not (warm.out / "finished.json").exists():
                Training(warm).run()
            if seed == 0:
                for name in REFERENCES:
                    records.append(_case(protocol, warm, name, None))
            records.append(_case(protocol, warm, "warm-up", seed))
            for arm in protocol.arms_of(task):
                begun = time.monotonic()
                records.append(_case(protocol, protocol.training(task, arm, seed, runs, warm.out), arm, seed))
                console.print(f"{task}, {arm}, seed {seed}: {time.monotonic() - begun:.0f} s")
    for task in protocol.tasks:
        records.append(cost(protocol, task, runs))
    return records


def _case(protocol: Protocol, settings: TrainSettings, arm: str, seed: int | None) -> Record:
    """Train (if need be) and score one arm and seed, or a reference."""
    assert protocol.out and protocol.test_clips
    name = f"{settings.task}-{arm}" + ("" if seed is None else f"-seed{seed}")
    described = settings.described() | {"arm": arm, "seed": seed, "test_clips": protocol.test_clips, "start": None}

    def measure() -> dict[str, Any]:
        training = Training(settings)
        clips = test_clips(training, protocol.test_clips or 0)
        clips.prepare("test")
        batch = clips.batch(range(len(clips)))
        kept = settings.out / "restored.safetensors"
        if arm == "input":
            restored = batch["condition"]
        elif arm == "autoencoder":
            restored = autoencoded_clips(training, clips)
        else:
            training.run()
            restored = restored_clips(training, clips)
            save_file({"restored": restored}, kept)
        losses = _losses(settings.out) if arm in (*ARMS, "warm-up") else []
        measured = scores(restored, batch["target"], training.device, (seed or 0) < protocol.fvd_seeds)
        return measured | {"losses": losses, "vae_sha256": vae_key(training.vae)}

    return _kept(protocol, name, described, measure)


def cost(protocol: Protocol, task: str, runs: Path, rounds: int = 3) -> Record:
    """Time and peak memory of one step of every arm, interleaved, in one process."""
    assert protocol.arms and protocol.out
    arms = protocol.arms_of(task) + (["full"] if "full" not in protocol.arms else [])
    settings = {arm: protocol.training(task, arm, 0, runs, Path("unused")) for arm in arms}
    described = settings["latent"].described() | {"arm": None, "arms": arms, "rounds": rounds, "start": None}

    def measure() -> dict[str, Any]:
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        peak: dict[str, int] = {}
        trainings = {arm: Training(dataclasses.replace(s, start=None)) for arm, s in settings.items()}
        for number in range(rounds + 1):
            for arm, training in trainings.items():
                batch = training.data.batch([0, 1])
                if number == 0:  # warms up, too
                    with PeakMemory(training.device) as memory:
                        training.update([batch])
                    peak[arm] = memory.peak_bytes
                else:
                    seconds[arm].append(_timed(training, batch))
        return {"step_seconds": seconds, "peak_bytes": peak}

    return _kept(protocol, f"{task}-cost", described, measure)


def _kept(
    protocol: Protocol, name: str, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
) -> Record:
    assert protocol.out
    described = dict(settings) | {"code": code_fingerprint()}
    record = run_case(protocol.out / f"{name}.json", described, measure, _device(protocol), code_in_settings=True)
    gc.collect()  # a run's networks and graphs
    return record


def restored_of(record: Record) -> torch.Tensor | None:
    """The restored clips of a record, where they are still on this machine."""
    pattern = f"{record.settings['task']}-{record.settings['arm']}-seed{record.settings['seed']}-*/restored.safetensors"
    found = sorted((ROOT / "runs" / "tasks" / "trained").glob(pattern), key=lambda p: p.stat().st_mtime)
    return load_file(found[-1])["restored"] if found else None


def code_fingerprint() -> str:
    """Of all code that decides a result, so that nothing is kept over a change."""
    paths = sorted({p for pattern in CODE for p in ROOT.glob(pattern) if p.name not in NOT_CODE})
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _timed(training: Training, batch: dict[str, torch.Tensor]) -> float:
    device = training.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    training.update([batch])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _losses(out: Path) -> list[dict[str, float]]:
    lines = (out / "losses.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def _device(protocol: Protocol) -> str:
    return "cuda" if torch.cuda.is_available() and not protocol.cpu else "cpu"
