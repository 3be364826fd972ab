"""The main job: ``python -m bench`` (``tox -e bench``).

Gradient bias of both embedded decoders on a real clip, then peak memory of every strategy (each case in a fresh
process), then time (pytest-benchmark), then a table and a figure of it all. Finished cases are kept: run it again
after an interruption. On a machine with a GPU ``--full`` measures the published Wan 2.1 and CogVideoX architectures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track

from bench.cases import cases
from bench.memory import measure_memory
from bench.summary import figure, report
from suite.records import ROOT, provenance


@dataclass
class Config:
    """Settings of the benchmark."""

    full: bool = False
    """The published architectures (random weights, bfloat16) instead of the embedded decoders; needs a GPU."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    rounds: int = 3
    """Timed repetitions of each case."""
    bias: bool = True
    """Measure the gradient bias first."""
    out: Path = ROOT / "results"
    """Folder of the records, the table (bench-<device>.md) and the figure (bench-<device>.png)."""


def main(config: Config) -> None:
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {config.device} was asked for, but this PyTorch sees no CUDA device: pass --device cpu."
        )
    if config.full and device.type != "cuda":
        raise ValueError(
            "--full measures the full-size decoders, which would take days on a CPU: run it on a machine with a GPU, "
            "or leave it out to measure the embedded decoders."
        )
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {config.rounds}.")
    if config.bias:
        for vae in ("wan2.1", "cogvideox"):
            print(f"== gradient bias, {vae}", flush=True)
            result = (config.out / "gradient_bias" / f"{vae}.json").resolve()
            # Half the default crops, so that the whole job stays within ten minutes on two cores.
            command = [sys.executable, "analysis/gradient_bias.py", "--vae", vae, "--crops", "3"]
            run([*command, "--device", config.device, "--out", str(result)])
    made_by = provenance(config.device)
    todo = cases(config.device, config.full)
    for case in track(todo, description="peak memory", console=Console(stderr=True)):
        measure_memory(case, config.out / "memory", made_by)
    print("== time", flush=True)
    run(
        [sys.executable, "-m", "pytest", "bench/test_time.py", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
        + ["--benchmark-columns=median,min,rounds", "--benchmark-sort=name"],
        CHOPGRAD_BENCH_DEVICE=config.device,
        CHOPGRAD_BENCH_FULL=str(int(config.full)),
        CHOPGRAD_BENCH_ROUNDS=str(config.rounds),
        CHOPGRAD_BENCH_RESULTS=str(config.out.resolve()),
        CHOPGRAD_BENCH_COMMAND=made_by["command"],
    )
    name = f"bench-{'full-' if config.full else ''}{device.type}"
    text = report(config.out, todo)
    (config.out / f"{name}.md").write_text(text)
    figure(config.out, todo, config.out / f"{name}.png")
    print(text)
    print(f"Written: {name}.md and {name}.png in {config.out.name}/, one record per case in memory/ and time/.")


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
