"""VAEs are loaded from folders, and a folder that is not one says what it lacks."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

import chopgrad
from suite.vaes import EMBEDDED, load_vae
from tests.models import build, latents_for


@pytest.mark.parametrize("subfolder", [None, "vae"])
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "qwen", "cogvideox"])
def test_a_saved_vae_is_loaded_frozen(tmp_path, name, subfolder, caplog):
    vae = build(name, torch.float32)
    vae.save_pretrained(tmp_path / (subfolder or ""))
    caplog.clear()
    loaded = load_vae(str(tmp_path), subfolder=subfolder)
    z = latents_for(vae, 2)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not caplog.records  # diffusers warns about casts that should not be


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_vaes_load_by_name_and_by_folder(name):
    by_name, by_folder = load_vae(name), load_vae(str(EMBEDDED[name]))
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_folder.parameters(), strict=True))
    assert by_name.config.get("_class_name", type(by_name).__name__) in chopgrad.DECODERS
    assert load_vae(name, dtype=torch.bfloat16).decoder.conv_in is not None
    assert next(load_vae(name, dtype=torch.float64).parameters()).dtype == torch.float64


def write_config(folder, content):
    (folder / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda f: None, "has no config.json: pass a folder written by save_pretrained.*--subfolder vae"),
        (lambda f: write_config(f, "{"), "is not the config of a diffusers model"),
        (lambda f: write_config(f, "[]"), "is not the config of a diffusers model"),
        (lambda f: write_config(f, '{"a": 1}'), "is not the config of a diffusers model"),
        (
            lambda f: AutoencoderKL(norm_num_groups=1, block_out_channels=(2,)).save_pretrained(f),
            "holds a AutoencoderKL, but",
        ),
        (
            lambda f: write_config(f, json.dumps({"_class_name": "AutoencoderKLWan"})),
            "no .safetensors file: the weights are",
        ),
    ],
)
def test_a_folder_that_is_no_vae(tmp_path, prepare, sentence):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_vae(str(tmp_path))


def test_a_name_that_is_nothing():
    with pytest.raises(ValueError, match="No VAE could be loaded from 'no-such-vae'"):
        load_vae("no-such-vae")
