"""The examples run as a reader runs them, learn something, and stay short enough to be read at a glance."""

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from suite.vaes import EMBEDDED
from tests.models import build

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL_VIDEO = ("--frames", "9", "--size", "32", "32")


def run(name, *arguments):
    """Numbers printed by an example, by the word before them, step by step."""
    command = [sys.executable, f"examples/{name}.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    steps = [dict(re.findall(r"(\w+) (-?\d\S*)", line)) for line in done.stdout.splitlines() if "step" in line]
    return [{word: float(value) for word, value in step.items()} for step in steps], done.stdout


def test_a_pixel_loss_trains_a_transformer():
    steps, text = run("pixel_loss", *SMALL_VIDEO, "--steps", "24")
    latent, pixel = ([float(x) for x in re.findall(rf"{kind} loss (\S+)", text)] for kind in ("latent", "pixel"))
    assert len(latent) == len(pixel) == len(steps) == 24
    assert median(latent[-8:]) < 0.9 * median(latent[:8])
    # The prediction is off by sigma times the transformer's error; where sigma is small the VAE's own error is left.
    scaled = [loss / step["sigma"] ** 2 for loss, step in zip(pixel, steps) if step["sigma"] > 0.5]
    assert median(scaled[-4:]) < 0.5 * scaled[0]
    _, without = run("pixel_loss", *SMALL_VIDEO, "--steps", "3", "--pixel-weight", "0")
    first, *later = [step.group() for step in re.finditer("step.*", without)]
    assert first in text
    assert later
    assert not any(step in text for step in later)  # the pixel loss's gradient made another transformer


def test_a_reward_is_raised():
    steps, _ = run("reward_gradient", "--latent-frames", "3", "--latent-size", "4", "4", "--steps", "8")
    rewards = [step["reward"] for step in steps]
    assert len(rewards) == 8
    assert min(rewards[-3:]) > max(rewards[:3])


@pytest.mark.parametrize("arguments", [(), ("--loss", "lpips", "--exact")], ids=["mse", "lpips-exact"])
def test_a_decoder_is_fine_tuned(tmp_path, arguments):
    steps, _ = run("decoder_finetuning", *SMALL_VIDEO, "--steps", "5", "--save", str(tmp_path), *arguments)
    losses = [step["lpips" if arguments else "mse"] for step in steps]
    assert len(losses) == 5
    assert losses[-1] < 0.95 * losses[0]
    before, after = (AutoencoderKLWan.from_pretrained(folder).state_dict() for folder in (EMBEDDED["wan2.1"], tmp_path))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pixel_loss", ("--frames", "5", "--size", "8", "8", "--steps", "1")),
        ("reward_gradient", ("--latent-frames", "2", "--latent-size", "4", "4", "--steps", "1")),
        ("decoder_finetuning", ("--frames", "5", "--size", "8", "8", "--steps", "1", "--subfolder", "vae")),
    ],
)
def test_the_published_layout_is_taken(pipeline, name, arguments):
    steps, _ = run(name, "--pretrained", str(pipeline), *arguments)
    assert len(steps) == 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder, vae/ and transformer/, with small widths."""
    folder = tmp_path_factory.mktemp("pipeline")
    small = build("wan2.1", torch.float32)  # two pixels a latent
    small.register_to_config(scale_factor_spatial=2)
    small.save_pretrained(folder / "vae")
    WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=32,
        ffn_dim=32, num_layers=1,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES} == {"pixel_loss", "reward_gradient", "decoder_finetuning"}
