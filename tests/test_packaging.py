"""The wheel holds the library and nothing else, and the library runs where nothing of the suite is installed."""

import configparser
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import chopgrad

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {p.relative_to(ROOT).as_posix() for p in (ROOT / "chopgrad").rglob("*") if p.is_file() and p.suffix != ".pyc"}

OUTSIDE = """
import importlib.machinery, json, sys
wheel, absent = sys.argv[1], set(json.loads(sys.argv[2]))
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest)
sys.path.insert(0, wheel)

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

import chopgrad
assert chopgrad.__file__.startswith(wheel), chopgrad.__file__
assert all(hasattr(chopgrad, name) for name in chopgrad.__all__)
from chopgrad import Chop, Exact, decode, decoder_for, frame_loss, patch
from chopgrad.__main__ import main
from chopgrad.testing import check_decoder

vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
vae.eval().requires_grad_(False)
predicted = torch.randn(1, 16, 3, 4, 4, requires_grad=True)
video = torch.rand(1, 3, 5, 8, 8) * 2 - 1
for checkpoint, strategy in ((None, Chop(distance=1)), ("frame", Exact(offload=True, pieces=True))):
    decoder = decoder_for(vae, checkpoint=checkpoint)
    frame_loss(decoder, decoder.denormalize(predicted), video, F.mse_loss, strategy).backward()
assert predicted.grad.norm() > 0
check_decoder(decoder_for(vae), latent_frames=2)

z = torch.randn(1, 16, 3, 4, 4, requires_grad=True)
F.mse_loss(decode(decoder_for(vae), z), video).backward()
whole, z.grad = z.grad, None
with patch(vae):
    F.mse_loss(vae.decode(z).sample, video).backward()
assert torch.equal(whole, z.grad)

half = z.detach().bfloat16().requires_grad_()
vae.bfloat16()
frame_loss(decoder_for(vae), half, video, F.mse_loss).backward()  # the target stays in float32
assert 0.9 < half.grad.float().norm() / whole.norm() < 1.1
vae.save_config(sys.argv[3])
assert main(["plan", "--vae", sys.argv[3], "--frames", "1", "--size", "4x4", "--budget", "1GiB"]) == 0
print(json.dumps(sorted(absent & {name.split(".")[0] for name in sys.modules})))
"""


def built(target, folder):
    """A wheel or sdist of the working tree."""
    pytest.importorskip("hatchling", reason="the build backend, hatchling, is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_library_and_its_licence(wheel):
    info = f"chopgrad-{chopgrad.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        licence = content.read(f"{info}/licenses/LICENSE").decode()
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert names == SOURCES | {f"{info}/{name}" for name in files}
    assert licence == (ROOT / "LICENSE").read_text()


def lowest(requirement):
    """("torch", "2.6") of what has a lower bound and nothing else: an installer keeps any version from there on."""
    (found,) = re.findall(r"^([\w-]+)>=([\d.]+)$", requirement)
    return found


def test_the_wheel_asks_for_torch_and_diffusers_only_and_keeps_those_that_are_there(wheel):
    with zipfile.ZipFile(wheel) as content:
        text = content.read(f"chopgrad-{chopgrad.__version__}.dist-info/METADATA").decode()
    required = [line for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE) if "extra ==" not in line]
    assert sorted(name for name, _ in map(lowest, required)) == ["diffusers", "torch"]
    assert sorted(required) == sorted(PROJECT["project"]["dependencies"])


def test_the_lowest_versions_are_those_that_tox_tests():
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    tested = dict(
        re.fullmatch(r"([\w-]+)==([\d.]+)\.\*", line).groups() for line in tox["testenv:lowest"]["deps"].split()
    )
    assert tested == dict(map(lowest, PROJECT["project"]["dependencies"]))


def test_the_sdist_holds_the_library_and_what_builds_it(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    top = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names == SOURCES | top


def test_the_library_runs_without_the_suite(wheel, tmp_path):
    """From another folder, the wheel alone, as if only torch and diffusers were installed beside it."""
    modules = importlib.metadata.packages_distributions()
    lists = [*PROJECT["project"]["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()]
    extra = {re.match(r"[\w-]+", line)[0] for lines in lists for line in lines} - {"numpy"}  # diffusers needs NumPy
    absent = {"analysis", "bench", "report", "suite", "tests", "weights"}
    absent |= {name.replace("-", "_") for name in extra}
    absent |= {name for name, found in modules.items() if extra & set(found)}
    assert {"accelerate", "matplotlib", "pytest", "tyro"} <= absent
    command = [sys.executable, "-c", OUTSIDE, str(wheel), json.dumps(sorted(absent)), str(tmp_path / "vae")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
