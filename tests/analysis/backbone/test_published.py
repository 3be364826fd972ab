"""A published transformer in the restoration task: its gradient is that of training, and of it a sample is kept."""

import dataclasses
import json
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import chopgrad
from analysis import backbone_gradient as bg
from analysis.backbone.published import PublishedRestoration, PublishedSettings
from analysis.backbone.task_settings import TaskSettings
from chopgrad import Chop
from suite.pairwise import truncated
from suite.records import ROOT, read_record
from tests.analysis.test_real_models import pipeline

NAME = "Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("published") / NAME, NAME)


def task_of(folder, dtype="float32", warm_up_steps=2, **published):
    settings = TaskSettings(
        vae=str(folder), subfolder="vae", dtype=dtype, frames=9, size=16, warm_up_steps=warm_up_steps, warm_up_clips=4
    )
    return PublishedRestoration(settings, PublishedSettings(pretrained=str(folder), **published))


def chopped_gradient(task, distance=1):
    """[kept] of the first of two generated clips."""
    samples = task.samples(2, seed=0, films=[])
    pairs = task.latent_pairs(task.restorer, samples[:1], F.mse_loss)
    return task.parameter_gradients(task.restorer, samples.condition[:1], truncated(pairs[0], distance)[None])[0]


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"parameters": "attn1"}, {"gradient_checkpointing": True}])
def test_the_gradient_is_that_of_training(folder, more):
    task = task_of(folder, **more)
    got, clip = chopped_gradient(task), task.samples(2, seed=0, films=[])[:1]
    restored = task.restore(task.restorer, clip.condition)
    chopgrad.frame_loss(task.decoder, restored, clip.clean, F.mse_loss, Chop(1)).backward()
    trained = {n: p for n, p in task.restorer.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained) if "lora_rank" in more else True
    assert all("attn1" in name for name in trained) if "parameters" in more else True
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained.values()])
    assert expected.norm() > 0
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4
    others = [p for p in task.restorer.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in others) and bool(others) == bool({"lora_rank", "parameters"} & set(more))


def test_fresh_lora_layers_see_a_projection_of_the_weights_gradient(folder):
    """dL/dB = dL/dW A^T, and nothing for A: what the docstring builds on."""
    weights, lora = task_of(folder, parameters="attn1.to_q.weight"), task_of(folder, lora_rank=4)
    projected = chopped_gradient(lora).split([p.numel() for p in lora.restorer.parameters() if p.requires_grad])
    layers = {n: (p, g) for (n, p), g in zip(
        ((n, p) for n, p in lora.restorer.named_parameters() if p.requires_grad), projected, strict=True
    )}  # fmt: skip
    (a, of_a), (b, of_b) = (next(v for n, v in layers.items() if f"attn1.to_q.lora_{x}" in n) for x in "AB")
    assert not of_a.any()
    expected = chopped_gradient(weights).reshape(32, 32) @ a.detach().T
    assert torch.allclose(of_b.reshape(b.shape), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_sample_is_part_of_the_whole_and_follows_the_seed(folder):
    whole = chopped_gradient(task_of(folder))
    task = task_of(folder, coordinates=300)
    some = chopped_gradient(task)
    assert len(some) == len(task.kept) == 300 and task.kept.total == len(whole) > 10_000
    assert torch.isin(some, whole).all()
    other = PublishedRestoration(task.settings, task.published, seed=1)
    assert not torch.equal(chopped_gradient(other), some)


def test_half_precision_as_the_trainer_has_it(folder):
    full, half = chopped_gradient(task_of(folder)), chopped_gradient(task_of(folder, dtype="bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.2 * full.norm()
    task = task_of(folder, dtype="bfloat16", lora_rank=2)
    assert {p.dtype for p in task.restorer.parameters() if p.requires_grad} == {torch.float32}


def test_lora_layers_are_warmed_up_and_read_back(folder, tmp_path, monkeypatch):
    before = task_of(folder, lora_rank=2)
    task = task_of(folder, lora_rank=2, warm_up=True)
    start = {n: p.clone() for n, p in task.restorer.named_parameters()}
    backbone = task.warmed_up("x", cache=tmp_path)
    changed = {n for n, p in backbone.named_parameters() if not torch.equal(p, start[n])}
    assert changed and all("lora" in n for n in changed)
    assert (tmp_path / next(iter(tmp_path.iterdir()))).stat().st_size < 200_000  # the LoRA layers alone
    monkeypatch.setattr(PublishedRestoration, "samples", lambda *a, **k: pytest.fail("trained again"))
    again = task_of(folder, lora_rank=2, warm_up=True).warmed_up("x", cache=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(backbone.parameters(), again.parameters(), strict=True))
    untouched = before.warmed_up("x", cache=tmp_path)
    assert all(torch.equal(p, start[n]) for n, p in untouched.named_parameters())


def words(folder, out, *more):
    options = {"vae": folder, "subfolder": "vae", "pretrained": folder, "task.frames": 9, "size": 16, "count": 4}
    options |= {"blocks": 1, "resamples": 5, "coordinates": 2000, "out": out}
    return [w for k, v in options.items() for w in (f"--{k}", str(v))] + list(more)


def run(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "analysis" / "backbone_gradient.py"), *words])
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_the_script_measures(folder, tmp_path, monkeypatch, capsys):
    run(words(folder, tmp_path / "out"), monkeypatch)
    record = read_record(tmp_path / "out" / f"backbone_gradient-{NAME}-generated-mse.json")
    assert str(tmp_path) not in json.dumps(record.settings | record.provenance)
    published = record.settings["task"]["published"]
    assert published["pretrained"] == NAME and published["coordinates"] == 2000 < published["parameters_in_all"]
    assert len(published["transformer_sha256"]) == 64 and "width" not in record.settings["task"]
    assert [r["distance"] for r in record.metrics["rows"]] == [0, 1, 2, 3] and len(record.metrics["claims"]) == 5
    assert record.metrics["pixel_mse"]["restored"] != record.metrics["pixel_mse"]["condition"]
    assert (tmp_path / "out" / f"backbone_gradient-{NAME}.png").stat().st_size > 10_000
    assert "host: gradients that are kept 0.00 GiB" in capsys.readouterr().err


def test_the_bytes_that_are_told(folder):
    task = task_of(folder, parameters="attn1.to_q.weight", coordinates=100)
    needed = task.bytes_needed(clips=6, truncations=5)
    everything = sum(p.numel() for p in [*task.restorer.parameters(), *task.vae.parameters()])
    assert needed["device: transformer and VAE"] == 4 * everything
    assert needed["device: one gradient"] == 4 * 32 * 32
    assert needed["device: clips"] == task.samples(6, 0, []).clean.nbytes
    assert needed["host: gradients that are kept"] == 4 * 6 * 5 * 100


def damaged(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / NAME)
    damage(tmp_path / NAME / "transformer")
    return tmp_path / NAME


def first_shard(transformer):
    return sorted(transformer.glob("*-of-*.safetensors"))[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: cut(first_shard(f)),
        lambda f: first_shard(f).unlink(),
        lambda f: [path.unlink() for path in f.glob("*.safetensors*")],
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "config.json").write_text("{"),
        lambda f: first_shard(f).write_text("version https://git-lfs.github.com/spec/v1\n"),
    ],
)
def test_what_is_wrong_with_the_transformer(folder, tmp_path, damage):
    broken = damaged(folder, tmp_path, damage)
    with pytest.raises(ValueError, match=f"No WanTransformer3DModel could be loaded from '{NAME}': .") as error:
        task_of(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--lora-rank", "-1"], "a LoRA rank of at least 0 .* are needed, got 2000, -1 and 400"),
        (["--coordinates", "0"], "At least 1 coordinate"),
        (["--timestep", "0"], "a timestep from 1 to 999 are needed"),
        (["--parameters", "("], r"--parameters is not a regular expression .*: got '\('"),
        (["--parameters", "attn7"], r"No parameter's name matches --parameters 'attn7': there are \d+, such as"),
        (["--warm-up"], "--warm-up trains LoRA layers: pass --lora-rank of at least 1 too"),
        (["--prompt", "nowhere"], "No file 'nowhere' for --prompt"),
        (["--cases", "early-mse"], "The case 'early-mse' is about a warm-up: pass --warm-up"),
        (["--size", "18"], "patches of 2x2, but a clip has 9x9 latents"),
        (["--size", "17"], "come back from this VAE as 16x16: pass --size 16"),
        (["--subfolder", "transformer"], "holds a WanTransformer3DModel, but the supported VAEs"),
        (["--device", "nonsense"], "No VAE could be loaded"),
    ],
)
def test_the_script_ends_in_one_sentence(folder, tmp_path, monkeypatch, more, sentence):
    with pytest.raises(SystemExit, match=sentence) as end:
        run(words(folder, tmp_path / "out", *more), monkeypatch)
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    assert not (tmp_path / "out").exists()


def test_a_transformer_of_another_family(folder):
    settings = TaskSettings(vae="cogvideox", frames=9, size=16)
    with pytest.raises(ValueError, match=f"No CogVideoXTransformer3DModel could be loaded from '{NAME}'") as error:
        PublishedRestoration(settings, PublishedSettings(pretrained=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"lora_rank": 2}, {"parameters": "a"}, {"warm_up": True}, {"coordinates": 5}])
def test_options_of_a_published_transformer_need_one(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is about a published transformer"):
        bg.main(bg.Config(published=PublishedSettings(**option)))


def test_a_prompt_changes_the_gradient_and_must_fit(folder, tmp_path):
    save_file({"prompt_embeds": torch.ones(1, 5, 8)}, tmp_path / "prompt.safetensors")
    with_prompt = task_of(folder, prompt=tmp_path / "prompt.safetensors")
    without = task_of(folder)
    assert not torch.equal(chopped_gradient(with_prompt), chopped_gradient(without))
    assert with_prompt.described()["published"]["prompt"] == "prompt.safetensors"
    shas = {t.described()["published"]["transformer_sha256"] for t in (with_prompt, without)}
    assert len(shas) == 2
    save_file({"prompt_embeds": torch.ones(1, 5, 9)}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"\[1, tokens, 8\] for this backbone, got \[1, 5, 9\]"):
        task_of(folder, prompt=tmp_path / "prompt.safetensors")


def test_the_cases_of_a_full_run():
    published = PublishedSettings(pretrained="a/b", lora_rank=2)
    cases = bg.Config(full=True, published=published).cases
    assert cases == tuple(c for c in bg.FULL_CASES if not c.startswith("early")) and len(cases) == 5
    warm = dataclasses.replace(published, warm_up=True)
    assert bg.Config(full=True, published=warm).cases == bg.FULL_CASES
    assert bg.Config(published=published).name == "backbone_gradient-b"
