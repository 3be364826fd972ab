"""VAEs are loaded from folders, and a folder that is not one says what it lacks."""

import json
import logging

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import chopgrad
from suite.vaes import EMBEDDED, load_vae
from tests.models import build, latents_for


@pytest.fixture
def diffusers_log(caplog):
    """What diffusers logs; it keeps its messages from the root logger, where caplog listens."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("subfolder", [None, "vae"])
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "qwen", "cogvideox"])
def test_a_saved_vae_is_loaded_frozen(tmp_path, name, subfolder):
    vae = build(name, torch.float32)
    vae.save_pretrained(tmp_path / (subfolder or ""))
    loaded = load_vae(str(tmp_path), subfolder=subfolder)
    z = latents_for(vae, 2)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_loading_is_silent_in_every_precision(tmp_path, name, dtype, diffusers_log):
    vae = build(name, torch.float32)
    vae.save_pretrained(tmp_path)
    diffusers_log.clear()
    loaded = load_vae(str(tmp_path), dtype=dtype)
    assert not diffusers_log.records
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    logging.getLogger("diffusers.models").warning("a warning")
    assert diffusers_log.records  # so a warning would have been heard


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_vaes_load_by_name_and_by_folder(name):
    by_name, by_folder = load_vae(name), load_vae(str(EMBEDDED[name]))
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_folder.parameters(), strict=True))
    assert by_name.config.get("_class_name", type(by_name).__name__) in chopgrad.DECODERS


def write_config(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())


def saved(folder, **changes):
    """A good folder but for changes to its config; the path of its weights."""
    build("wan2.1", torch.float32).save_pretrained(folder)
    write_config(folder, json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return folder / "diffusion_pytorch_model.safetensors"


def without(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda f: None, "has no config.json: pass a folder written by save_pretrained.*--subfolder vae"),
        (lambda f: write_config(f, "{"), "is not the config of a diffusers model"),
        (lambda f: write_config(f, "[]"), "is not the config of a diffusers model"),
        (lambda f: write_config(f, '{"a": 1}'), "is not the config of a diffusers model"),
        (lambda f: write_config(f, b"\xff\xfe\x00"), "is not the config of a diffusers model"),
        (lambda f: write_config(f, '{"_class_name": ["AutoencoderKLWan"]}'), "but the supported VAEs are"),
        (lambda f: write_config(f, '{"_class_name": "UNet"}'), "holds a UNet, but the supported VAEs are Autoencoder"),
        (lambda f: saved(f).unlink(), "no .safetensors file: the weights are missing"),
        (lambda f: saved(f).write_bytes(b""), "No VAE could be loaded from .*: Unable to load weights"),
        (
            lambda f: saved(f).write_bytes(b"not weights" * 100),
            "No VAE could be loaded from .*: Unable to load weights",
        ),
        (lambda f: saved(f, base_dim=16), "No VAE could be loaded from .* expected shape"),
        (lambda f: saved(f, base_dim="eight"), "No VAE could be loaded from"),
        (
            lambda f: without(saved(f), "decoder.conv_in.weight"),
            "lack 1 of the model's tensors.*decoder.conv_in.weight",
        ),
        (lambda f: saved(f, _class_name="AutoencoderKLCogVideoX"), "its weights lack .* of the model's tensors"),
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
    with pytest.raises(ValueError, match=sentence) as error:
        load_vae(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("subfolder", "sentence"), [(None, "--subfolder vae"), ("decoder", "has no config.json")])
def test_a_pipeline_needs_the_right_subfolder(tmp_path, subfolder, sentence):
    saved(tmp_path / "vae")
    with pytest.raises(ValueError, match=sentence):
        load_vae(str(tmp_path), subfolder=subfolder)


def test_a_device_that_is_not_there(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="No VAE could be loaded from"):
        load_vae(str(tmp_path), device="cuda:99")


def test_a_name_that_is_nothing():
    with pytest.raises(ValueError, match="No VAE could be loaded from 'no-such-vae'"):
        load_vae("no-such-vae")
