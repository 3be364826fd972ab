"""Training: it learns, resumes bit for bit after a kill, and several processes do what one does."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.tasks.pictures import write_video
from bench.tasks.training.restore import restore_video
from bench.tasks.training.settings import TrainSettings, settings_from
from bench.tasks.training.train import Training
from suite.clips import read_frames
from suite.motion import moving_clip
from suite.records import ROOT
from tests.bench.tasks.training.distributed_step import on_worker
from tests.processes import on_workers, start

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
NAMES = {"arm": "gradient"}  # what the command line calls it


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def settings(tmp_path, cache) -> TrainSettings:
    return TrainSettings(
        task="driving", out=tmp_path / "run", arm="chop-1", width=32, layers=1, frames=5, size=(16, 16), clips=4,
        steps=3, rate=1e-2, decoder_rate=1e-3, samples=1, cpu=True, cache=cache,
    )  # fmt: skip


def command_line(settings: TrainSettings) -> None:
    """``python -m bench.tasks train``, in this process."""
    words = []
    values = settings.everything() | {"cpu": None, "gradient_checkpointing": None}
    for name, value in values.items():
        if value is not None:
            shown = [str(x) for x in value] if isinstance(value, list | tuple) else [str(value)]
            words += [f"--{NAMES.get(name, name).replace('_', '-')}", *shown]
    sys.argv = ["bench.tasks", "train", "--cpu", *words]
    runpy.run_module("bench.tasks", run_name="__main__", alter_sys=True)


def waiting_in_step_four(settings: TrainSettings) -> None:
    """The same, until somebody kills it."""
    update, calls = Training.update, count(1)

    def waiting(*arguments):
        if next(calls) == 4:
            signal.pause()
        return update(*arguments)

    Training.update = waiting
    command_line(settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    both = {}
    for part in ("transformer", "vae"):
        both |= {f"{part}.{k}": v for k, v in load_file(out / part / "diffusion_pytorch_model.safetensors").items()}
    return both


def test_a_run_learns_and_leaves_what_it_promises(settings):
    settings = dataclasses.replace(settings, steps=12, checkpoint_every=5)
    training = Training(settings)
    before = training.decoder.vae.decoder.conv_in.weight.clone()
    training.run()
    log = [json.loads(line) for line in (settings.out / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 13))
    assert sum(r["pixel"] for r in log[-4:]) < 0.8 * sum(r["pixel"] for r in log[:4])
    assert not torch.equal(before, training.decoder.vae.decoder.conv_in.weight)
    assert sorted(p.name for p in (settings.out / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert (settings.out / "samples/step-00000012/sheet.png").stat().st_size > 1000
    assert len(read_frames(settings.out / "samples/step-00000012/clip-0.mp4")) == 5
    assert json.loads((settings.out / "finished.json").read_text())["steps"] == 12


def test_a_killed_run_ends_with_the_same_bits(settings):
    """Killed for real, by SIGKILL, between two checkpoints; the command is then given again."""
    settings = dataclasses.replace(settings, steps=6, checkpoint_every=2)
    whole = dataclasses.replace(settings, out=settings.out.with_name("whole"))
    torch.set_num_threads(1)
    Training(whole).run()

    process = start(waiting_in_step_four, settings)
    log = settings.out / "losses.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()):
        assert process.is_alive(), "the run failed; its error is in the captured output"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (settings.out / "finished.json").exists()
    again = start(command_line, settings)
    again.join()
    assert again.exitcode == 0
    ours, theirs = weights(settings.out), weights(whole.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    steps = [json.loads(line)["step"] for line in (settings.out / "losses.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.fixture(params=["ddp", "fsdp"])
def shared(request, settings) -> tuple[TrainSettings, bool]:
    """One update of a batch of two, and whether the model is sharded; with DDP the decoder's gradients are shared."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    fsdp = request.param == "fsdp"
    task, arm = ("inpainting", "latent") if fsdp else ("driving", "chop-1")
    return dataclasses.replace(settings, task=task, arm=arm, batch=2, steps=1), fsdp


def test_two_processes_have_the_gradient_of_one(shared, tmp_path):
    settings, fsdp = shared
    found = []
    for processes in (1, 2):
        out = tmp_path / f"gradients-{processes}.safetensors"
        on_workers(on_worker, settings, out, processes, fsdp and processes == 2, tmp_path / "store", count=processes)
        found.append(load_file(out))
    same_gradients(settings, fsdp, *found)


def same_gradients(settings: TrainSettings, fsdp: bool, one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert len(one) > 20
    assert sum(bool(g.any()) for g in one.values()) > 20
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6 * one[name].abs().max().item() + 1e-9), name
    if fsdp:
        assert load_file(settings.out / "transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_accelerate_launches_two_processes(shared, tmp_path):
    """The same, started as a user starts them: five processes that import everything."""
    settings, fsdp = shared
    (tmp_path / "settings.json").write_text(json.dumps(settings.everything()))
    script, found = str(Path(__file__).with_name("distributed_step.py")), []
    # accelerate's own launcher for several CPU processes needs MPI; that for several GPUs starts any processes, and the
    # training's setting ``cpu`` lets them meet over gloo.
    launches = (["--cpu", "--num_processes", "1"], ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"])
    for number, launch in enumerate(launches):
        out = tmp_path / f"gradients-{number}.safetensors"
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, script]
        command += [str(tmp_path / "settings.json"), str(out), str(number + 1)]
        command += ["fsdp"] * (fsdp and number == 1)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=400,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(out))
    same_gradients(settings, fsdp, *found)


def test_accumulation_is_a_larger_batch(settings):
    """Two forward passes of one clip have the gradient of one of two."""
    gradients = []
    for batch, accumulate in ((2, 1), (1, 2)):
        s = dataclasses.replace(settings, batch=batch, accumulate=accumulate, task="inpainting", arm="latent")
        training = Training(s)
        kept: list[torch.Tensor] = []
        original = training._clip_and_share

        def keep(training=training, kept=kept, original=original) -> None:
            original()
            kept += [p.grad.clone() for p in training.model.parameters() if p.grad is not None]

        training._clip_and_share = keep
        rows = [[0, 1]] if batch == 2 else [[0], [1]]
        training.update([training.data.batch(r) for r in rows])
        gradients.append(torch.cat([g.flatten() for g in kept]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_folder_with_another_run_is_refused(settings):
    Training(dataclasses.replace(settings, steps=1, samples=0)).run()
    with pytest.raises(ValueError, match=r"holds a run with rate 0.01, this one has 0.5: pass another --out"):
        Training(dataclasses.replace(settings, rate=0.5)).run()
    Training(dataclasses.replace(settings, steps=2, samples=0)).run()  # more steps go on
    assert json.loads((settings.out / "finished.json").read_text())["steps"] == 2


def test_a_run_starts_from_anothers_weights_and_restores_a_video(settings, tmp_path):
    Training(dataclasses.replace(settings, steps=1)).run()
    trained = weights(settings.out)
    later = Training(dataclasses.replace(settings, out=tmp_path / "next", start=settings.out))
    state = later.model.state_dict()
    assert all(torch.equal(state[f"backbone.{k[12:]}"], v) for k, v in trained.items() if k.startswith("transformer."))
    assert all(torch.equal(later.vae.state_dict()[k[4:]], v) for k, v in trained.items() if k.startswith("vae."))

    write_video(tmp_path / "in.mp4", moving_clip(torch.Generator().manual_seed(0), 7, 34, 50))
    restore_video(settings.out, tmp_path / "in.mp4", tmp_path / "out.mp4", cpu=True)
    assert read_frames(tmp_path / "out.mp4").shape == (5, 32, 48, 3)
    with pytest.raises(ValueError, match=r"--out must name an .mp4 file, got 'out.gif'"):
        restore_video(settings.out, tmp_path / "in.mp4", tmp_path / "out.gif")
    with pytest.raises(ValueError, match="'nowhere' holds no run"):
        restore_video(tmp_path / "nowhere", tmp_path / "in.mp4", tmp_path / "out.mp4")
    with pytest.raises(ValueError, match="holds no finished run"):
        Training(dataclasses.replace(settings, out=tmp_path / "other", start=tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (20, 16)}, r"multiples of 8, got 20 16"),
        ({"frames": 6}, "6 frames fit no number of latents of this VAE: pass 5"),
        ({"task": "sorting"}, "Unknown task 'sorting'"),
        ({"arm": "chop"}, "Unknown arm or gradient 'chop'"),
        ({"batch": 9}, "batch of 9 needs at least as many clips, got 4"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"pretrained": "no-such-folder"}, "No WanTransformer3DModel could be loaded from 'no-such-folder'"),
        ({"prompt": Path("none.safetensors")}, "The prompt 'none.safetensors' cannot be read"),
        ({"vae": "no-such-vae"}, "No VAE could be loaded from 'no-such-vae'"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(settings, changes, words):
    with pytest.raises(ValueError, match=words):
        Training(dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_settings_survive_their_file(settings):
    assert settings_from(json.loads(json.dumps(settings.everything()))) == settings
