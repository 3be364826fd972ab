"""Folders laid out like the published repositories, in small widths: they load, and what is wrong is one sentence."""

import importlib
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from analysis import backbone_gradient, error_bound, gradient_bias, spatial_locality, temporal_locality
from analysis.locality import fits
from analysis.real_clips import Crops
from chopgrad import Full
from chopgrad.__main__ import main as chopgrad_command
from chopgrad.planner import plan
from suite.records import ROOT, read_record
from suite.vaes import load_vae
from tests.models import build, latents_for
from weights import evaluate

PUBLISHED = {
    "Wan2.1-T2V-1.3B-Diffusers": ("wan2.1", "WanPipeline"),
    "Wan2.2-TI2V-5B-Diffusers": ("wan2.2", "WanPipeline"),
    "CogVideoX-2b": ("cogvideox", "CogVideoXPipeline"),
}
SHARD_SIZE = "40KB"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def pipeline(folder: Path, name: str = "Wan2.1-T2V-1.3B-Diffusers", sharded: bool = False) -> Path:
    """model_index.json, vae/ and (for Wan) transformer/, as the pipelines' save_pretrained lays them out."""
    model, kind = PUBLISHED[name]
    vae = build(model, torch.float32)
    vae.save_pretrained(folder / "vae", max_shard_size=SHARD_SIZE if sharded else "10GB")
    parts = {"vae": ["diffusers", type(vae).__name__]}
    if kind == "WanPipeline":
        transformer = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=32,
            ffn_dim=32, num_layers=1,
        )  # fmt: skip
        transformer.save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
        parts["transformer"] = ["diffusers", "WanTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    return folder


def shards(folder: Path) -> list[Path]:
    found = sorted((folder / "vae").glob("*-of-*.safetensors"))
    assert len(found) > 2, "the model must be large enough for several shards"
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_is_loaded(tmp_path, name, sharded):
    folder = pipeline(tmp_path / name, name, sharded)
    if sharded:
        shards(folder)
        assert (folder / "vae" / INDEX).is_file()
    original = build(PUBLISHED[name][0], torch.float32)
    z = latents_for(original, 3)
    for loaded in (load_vae(str(folder), subfolder="vae"), load_vae(str(folder / "vae"))):
        assert torch.equal(loaded.decode(z).sample, original.decode(z).sample)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def move_a_tensor(folder: Path) -> None:
    """The first shard loses a tensor that the index still places there."""
    path = shards(folder)[0]
    weights = load_file(path)
    del weights[next(iter(weights))]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: shards(f)[1].unlink(), r"lacks 1 of the \d+ shards in its index, the first is .*-00002-of-"),
        (lambda f: [s.unlink() for s in shards(f)[1:]], r"lacks \d+ of the \d+ shards in its index"),
        (lambda f: cut(shards(f)[2], 12_000), "00003-of-.* is cut off: 12000 bytes of .* Download it again"),
        (lambda f: cut(shards(f)[0], 100), "00001-of-.* is cut off: 100 bytes of"),
        (lambda f: cut(shards(f)[0], 3), "No VAE could be loaded from"),
        (lambda f: shards(f)[0].write_bytes(b"not weights" * 100), "No VAE could be loaded from"),
        (lambda f: shards(f)[0].write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
        (lambda f: (f / "vae" / INDEX).unlink(), "has shards but no diffusion_pytorch_model.safetensors.index.json"),
        (lambda f: (f / "vae" / INDEX).write_text("{"), "is not an index of shards"),
        (lambda f: (f / "vae" / INDEX).write_text('{"weight_map": ["a"]}'), "is not an index of shards"),
        (lambda f: move_a_tensor(f), "00001-of-.* lacks .*, which the index places there"),
    ],
)
def test_what_is_wrong_with_the_shards(tmp_path, damage, sentence):
    folder = pipeline(tmp_path, sharded=True)
    load_vae(str(folder), subfolder="vae")
    damage(folder)
    with pytest.raises(ValueError, match=sentence) as error:
        load_vae(str(folder), subfolder="vae")
    assert "\n" not in str(error.value)


def test_a_single_file_that_is_cut_off(tmp_path):
    weights = pipeline(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors"
    cut(weights, weights.stat().st_size - 1)
    with pytest.raises(ValueError, match="is cut off"):
        load_vae(str(tmp_path), subfolder="vae")


@pytest.mark.parametrize(
    ("source", "subfolder", "sentence"),
    [
        ("", None, "has no config.json.*--subfolder vae"),
        ("", "transformer", "holds a WanTransformer3DModel, but the supported VAEs are AutoencoderKLWan"),
        ("", "text_encoder", "has no config.json"),
        ("vae/diffusion_pytorch_model.safetensors", None, "is a file: pass the folder"),
    ],
)
def test_the_wrong_part_of_a_pipeline(tmp_path, source, subfolder, sentence):
    folder = pipeline(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        load_vae(str(folder / source), subfolder=subfolder)
    assert "\n" not in str(error.value)


def test_a_config_of_another_class_over_good_weights(tmp_path):
    config = pipeline(tmp_path) / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKLWan", "AutoencoderKLCosmos"))
    with pytest.raises(ValueError, match="holds a AutoencoderKLCosmos, but the supported VAEs are"):
        load_vae(str(tmp_path), subfolder="vae")


SMALL = Crops(None, count=1, frames=9, size=(24, 24))


@pytest.mark.parametrize("script", [temporal_locality, spatial_locality, error_bound], ids=lambda m: m.__name__)
def test_the_theory_runs_on_a_part_of_a_pipeline(tmp_path, monkeypatch, script):
    name = "Wan2.1-T2V-1.3B-Diffusers"
    folder = pipeline(tmp_path / name)
    monkeypatch.setattr(fits, "compare", partial(fits.compare, resamples=20))
    if script is error_bound:
        monkeypatch.setattr(script.Config, "crops", lambda self, _: SMALL)
    else:
        monkeypatch.setattr(script.Config, "small_crops" if script is temporal_locality else "crops", SMALL)
    script.main(script.Config(vaes=(str(folder),), subfolder="vae", out=tmp_path / "out"))
    record = read_record(tmp_path / "out" / f"{script.__name__.rpartition('.')[2]}-{name}.json")
    assert record.settings["vae"] == name
    assert record.metrics["samples"]
    assert str(tmp_path) not in json.dumps([record.settings, record.metrics])
    with pytest.raises(ValueError, match="--subfolder vae"):
        script.main(script.Config(vaes=(str(folder),), out=tmp_path / "out"))


def test_bias_and_reconstruction_run_on_a_part_of_a_pipeline(tmp_path):
    folder = pipeline(tmp_path / "p", "CogVideoX-2b", sharded=True)
    settings = gradient_bias.Config(
        vae=str(folder), subfolder="vae", crops=1, frames=9, size=(8, 8), losses=("mse",), blocks=(1,),
        device="cpu", out=tmp_path / "bias.json",
    )  # fmt: skip
    assert read_record(gradient_bias.measure(settings)).metrics["summary"]
    shown = evaluate.Config(
        vae=str(folder), subfolder="vae", crops=1, frames=9, sizes=(8,), device="cpu", out=tmp_path / "psnr.json"
    )
    assert read_record(evaluate.evaluate(shown)).metrics["clips"]


def test_the_planner_takes_a_part_of_a_pipeline(tmp_path, capsys):
    folder = pipeline(tmp_path)
    settings = {"frames": 5, "height": 8, "width": 8, "strategies": [Full()]}
    assert plan(str(folder), subfolder="vae", **settings) == plan(str(folder / "vae"), **settings)
    command = ["plan", "--frames", "5", "--size", "8x8", "--vae", str(folder), "--subfolder"]
    assert chopgrad_command([*command, "decoder"]) == 2
    assert "in its subfolder 'decoder'" in capsys.readouterr().err
    assert chopgrad_command([*command, "vae", "--checkpoint", "none"]) == 0
    assert "Full()" in capsys.readouterr().out


def documented():
    """The commands of the page that run an analysis, as words."""
    text = (
        (ROOT / "docs" / "real-models.md").read_text().replace("\\\n", " ").replace("$MODEL", "owner/Wan2.1-Diffusers")
    )
    return [shlex.split(line, comments=True) for line in re.findall(r"^python analysis/.*$", text, re.MULTILINE)]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_the_commands_of_the_page_are_understood(words):
    module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    config = tyro.cli(module.Config, args=words[2:])
    where = getattr(config, "task", config)
    assert (where.subfolder, where.device) == ("vae", "cuda")
    assert "owner/Wan2.1-Diffusers" in (getattr(where, "vae", None), *getattr(where, "vaes", ()))
    if hasattr(config, "check"):
        config.check()


def test_the_page_has_a_command_for_every_analysis():
    names = {words[1] for words in documented()}
    assert {f"analysis/{name}.py" for name in ("backbone_gradient", "estimators", "training_bias")} < names
    assert len(documented()) == 9
    (published,) = (w for w in documented() if "--pretrained" in w)
    config = tyro.cli(backbone_gradient.Config, args=published[2:])
    assert config.published.pretrained == config.task.vae and config.task.size == 256
    assert config.task.dtype == "bfloat16" and config.published.gradient_checkpointing


@pytest.mark.usefixtures("small_films")
@pytest.mark.parametrize("script", ["estimators", "training_bias"])
def test_the_small_backbone_learns_on_a_part_of_a_pipeline(tmp_path, script):
    folder = pipeline(tmp_path / "p")
    module = importlib.import_module(f"analysis.{script}")
    words = ["--vae", str(folder), "--task.frames", "13", "--task.size", "16", "--task.width", "32"]
    words += ["--task.layers", "1", "--task.warm-up-steps", "1", "--task.warm-up-clips", "4", "--out", str(tmp_path)]
    words += {
        "estimators": ["--cases", "look_ahead", "--count", "4"],
        "training_bias": ["--seeds", "1", "--steps", "1", "--toy-seeds", "1", "--toy-steps", "2"],
    }[script]
    module.main(tyro.cli(module.Config, args=[*words, "--subfolder", "vae"]))
    name = {"estimators": "estimators-look_ahead", "training_bias": "training_bias-end_task"}[script]
    settings = read_record(tmp_path / f"{name}.json").settings
    assert settings["task"]["vae"] == "p" and str(tmp_path) not in json.dumps(settings)
    with pytest.raises(ValueError, match=r"has no config.json.*--subfolder vae"):
        module.main(tyro.cli(module.Config, args=words))
