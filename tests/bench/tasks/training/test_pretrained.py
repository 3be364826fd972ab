"""The path to real weights: folders with the layout of the published pipelines, in small widths."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from bench.tasks.training.restorer import fresh_backbone
from bench.tasks.training.settings import TrainSettings
from bench.tasks.training.train import Training
from suite.vaes import load_vae

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """vae/ and transformer/ (sharded) as in Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    folder = tmp_path_factory.mktemp("Wan2.1-Diffusers")
    vae = load_vae("wan2.1")
    vae.save_pretrained(folder / "vae")
    channels = vae.config.z_dim
    torch.manual_seed(0)
    WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=channels, out_channels=channels, text_dim=16, freq_dim=32, ffn_dim=64,
        num_layers=2, num_attention_heads=1, attention_head_dim=32,
    ).save_pretrained(folder / "transformer", max_shard_size="100KB")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("CogVideoX")
    vae = load_vae("cogvideox")
    vae.save_pretrained(folder / "vae")
    channels = vae.config.latent_channels
    torch.manual_seed(0)
    CogVideoXTransformer3DModel(
        in_channels=channels, out_channels=channels, text_embed_dim=16, time_embed_dim=32, num_layers=2,
        num_attention_heads=2, attention_head_dim=32, sample_width=4, sample_height=4, sample_frames=9,
        max_text_seq_length=3, use_rotary_positional_embeddings=True,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    CogVideoXDDIMScheduler(snr_shift_scale=1.0, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def settings_for(folder, tmp_path, task="inpainting", **more) -> TrainSettings:
    return TrainSettings(
        task=task, out=tmp_path / "run", vae=str(folder), subfolder="vae", pretrained=str(folder), arm="chop-1",
        lora_rank=4, frames=9, size=(32, 32), clips=2, steps=2, samples=0, cpu=True, cache=tmp_path / "clips",
        gradient_checkpointing=True, rate=1e-2, perceptual_stride=4, **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_lora_on_a_published_layout(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    settings = settings_for(folder, tmp_path, mixed_precision="bf16")
    training = Training(settings)
    frozen = {n: p.clone() for n, p in training.model.named_parameters() if not p.requires_grad}
    trained = [p.numel() for p in training.model.parameters() if p.requires_grad]
    assert 0 < sum(trained) < sum(p.numel() for p in frozen.values())
    assert {p.dtype for p in training.model.parameters() if p.requires_grad} == {torch.float32}
    training.run()
    assert all(torch.equal(p, frozen[n]) for n, p in training.model.named_parameters() if not p.requires_grad)
    saved = load_file(settings.out / "pytorch_lora_weights.safetensors")
    assert any("lora_B" in k and v.abs().max() > 0 for k, v in saved.items())
    assert all(k.startswith("transformer.") for k in saved)  # where pipelines look for them
    checkpoint = sorted((settings.out / "checkpoints").glob("*/trainable.safetensors"))[-1]
    assert checkpoint.stat().st_size < 8 * sum(trained) + 100_000  # nothing of the frozen weights
    again = Training(dataclasses.replace(settings, out=tmp_path / "next", start=settings.out))
    ours = {n: p for n, p in training.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, ours[n]) for n, p in again.model.named_parameters() if p.requires_grad)


def test_all_weights_of_a_published_layout(wan, tmp_path):
    settings = dataclasses.replace(settings_for(wan, tmp_path), lora_rank=0)
    Training(settings).run()
    WanTransformer3DModel.from_pretrained(settings.out / "transformer")


def test_a_prompt_of_the_right_width_is_taken(wan, tmp_path):
    save_file({"prompt_embeds": torch.ones(1, 5, 16)}, tmp_path / "prompt.safetensors")
    training = Training(settings_for(wan, tmp_path, prompt=tmp_path / "prompt.safetensors"))
    assert training.model.prompt.shape == (1, 5, 16)
    save_file({"prompt_embeds": torch.ones(1, 5, 15)}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"\[1, tokens, 16\] for this backbone, got \[1, 5, 15\]"):
        Training(settings_for(wan, tmp_path, prompt=tmp_path / "prompt.safetensors"))


def test_a_truncated_shard_and_a_wrong_model_are_named(wan, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(wan, broken)
    shard = sorted((broken / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="No WanTransformer3DModel could be loaded from 'broken'"):
        Training(settings_for(broken, tmp_path))
    other_channels = tmp_path / "other"
    fresh_backbone("wan", 6, (3, 4, 4), 32, 1, 0).save_pretrained(other_channels / "transformer")
    with pytest.raises(ValueError, match="takes 6 latent channels, the VAE gives 64"):
        settings = dataclasses.replace(settings_for(wan, tmp_path), pretrained=str(other_channels))
        Training(settings)
