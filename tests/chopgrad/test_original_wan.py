"""Wan's VAE in the classes of the original repositories and of DiffSynth-Studio: their own files, from the registry.

The packages are optional: where one is absent its cases are skipped by name. They are read as files, because importing
the packages asks for the frameworks around the VAE.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.decoders import OriginalWanDecoder
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error

SMALL = {"dim": 4, "z_dim": 4, "num_res_blocks": 1}
ONE, TWO = (
    {"dim_mult": [1, 2], "temperal_downsample": [True]},
    {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True]},
)
CLASSES = {
    "Wan 2.1": ("wan", "modules/vae2_1.py", "WanVAE_", SMALL | ONE),
    "Wan 2.2": ("wan", "modules/vae2_2.py", "WanVAE_", SMALL | TWO | {"dec_dim": 4}),
    "DiffSynth 2.1": ("diffsynth", "models/wan_video_vae.py", "VideoVAE_", SMALL | ONE),
    "DiffSynth 2.2": ("diffsynth", "models/wan_video_vae.py", "VideoVAE38_", SMALL | TWO | {"dec_dim": 4}),
}
PACKAGES = {"wan": "wan22", "diffsynth": "diffsynth"}


@cache
def module(package, path):
    spec = importlib.util.find_spec(package)
    if spec is None or importlib.util.find_spec("einops") is None:
        pytest.skip(f"needs einops, and {PACKAGES[package]} without its dependencies (pip install --no-deps)")
    name = f"original_{package}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(spec.submodule_search_locations[0]) / path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def build(name, dtype=torch.float64):
    package, path, cls, settings = CLASSES[name]
    source = module(package, path)
    torch.manual_seed(0)
    vae = getattr(source, cls)(**settings)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for layer in vae.modules():
        if dtype is torch.float64 and isinstance(layer, source.Upsample):
            layer.__class__ = nn.Upsample  # without its cast to float32
    return vae.to(dtype).eval().requires_grad_(False)


def latents(count, batch=1):
    return torch.randn(batch, 4, count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scale():
    generator = torch.Generator().manual_seed(2)
    mean, std = torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5
    return mean.double(), std.double()


def around(vae):
    """What knows the statistics and clamps: as much of ``Wan2_1_VAE`` and ``WanVideoVAE`` as counts."""
    mean, std = scale()
    return SimpleNamespace(model=vae, scale=[mean, 1 / std])


def gradients(loss, z, parameters):
    """Zero for what a video does not use: the first latent passes the upsamplers in time by."""
    found = torch.autograd.grad(loss, [z, *parameters], allow_unused=True, materialize_grads=True)
    return [x.detach() for x in found]


STRATEGIES = [
    *(Full(), Exact(offload=False), Exact(every=2), Exact(pieces=True)),
    *(Chop(9), Chop(9, block=2), Chop(9, block=2, recompute=True, pieces=True)),
]


@pytest.mark.parametrize("name", CLASSES)
def test_frames_and_gradients_are_those_of_its_own_decode(name):
    vae = build(name).requires_grad_(True)
    mean, std = scale()
    for count, batch in ((1, 1), (2, 1), (3, 2), (6, 1)):
        z = latents(count, batch).requires_grad_()
        theirs = vae.decode((z - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1), [mean, 1 / std])
        target = torch.zeros_like(theirs)
        decoder = chopgrad.decoder_for(vae)
        parameters = list(decoder.parameters())
        assert len(parameters) == len(list(vae.decoder.parameters())) + 2
        plain = gradients(F.mse_loss(theirs, target), z, parameters)
        for strategy in STRATEGIES:
            leaf = z.detach().clone().requires_grad_()
            ours = chopgrad.decode(decoder, leaf, strategy)
            assert relative_error(ours.detach(), theirs.detach()) < 1e-14
            streamed = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
            for loss in (F.mse_loss(ours, target), streamed):
                for a, b in zip(gradients(loss, leaf, parameters), plain, strict=True):
                    assert (a - b).norm() < 1e-11 * max(b.norm(), 1e-3 * plain[0].norm())


@pytest.mark.parametrize("checkpoint", ["frame", "residual", "block"])
@pytest.mark.parametrize("name", CLASSES)
def test_recomputing_inside_a_group_changes_nothing(name, checkpoint):
    vae, z = build(name), latents(4).requires_grad_()
    decoder = chopgrad.decoder_for(vae, checkpoint=checkpoint)
    theirs = decoder.own_decode(z)
    (plain,) = torch.autograd.grad(theirs.square().mean(), z)
    loss = chopgrad.frame_loss(decoder, z, torch.zeros_like(theirs), F.mse_loss, Exact(pieces=checkpoint == "frame"))
    assert relative_error(torch.autograd.grad(loss, z)[0], plain) < 1e-11


@pytest.mark.parametrize("name", CLASSES)
def test_the_kit_finds_nothing(name):
    check_decoder(chopgrad.decoder_for(around(build(name))), latent_frames=3)


@pytest.mark.parametrize("name", CLASSES)
def test_a_patched_model_decodes_normalised_latents_as_before(name):
    vae, z = build(name), latents(4)
    mean, std = scale()
    for how in ([mean, 1 / std], [mean.float(), 1 / std.float()]):
        leaf = z.clone().requires_grad_()
        theirs = vae.decode(leaf, [x.double() for x in how])
        (plain,) = torch.autograd.grad(theirs.square().mean(), leaf)
        with chopgrad.patch(vae):
            ours = vae.decode(leaf, how)
        assert relative_error(ours.detach(), theirs.detach()) < 1e-14
        assert relative_error(torch.autograd.grad(ours.square().mean(), leaf)[0], plain) < 1e-11


@pytest.mark.parametrize("name", CLASSES)
def test_the_object_around_it_clamps_and_knows_the_statistics(name):
    vae, z = build(name), 9 * latents(3)
    mean, std = (x.view(1, -1, 1, 1, 1) for x in scale())
    outside = vae.decode(z, [torch.zeros(4).double(), torch.ones(4).double()])
    assert (outside.abs() > 1).any()
    wrapped, bare = chopgrad.decoder_for(around(vae)), chopgrad.decoder_for(vae)
    assert torch.equal(wrapped.decode(z), outside.clamp(-1, 1))
    assert torch.equal(bare.decode(z), outside)
    assert torch.equal(chopgrad.decoder_for(around(vae), clamp=False).decode(z), outside)
    assert torch.allclose(wrapped.denormalize(z), z * std + mean)
    assert torch.allclose(wrapped.normalize(wrapped.denormalize(z)), z)
    with pytest.raises(ValueError, match="does not know the statistics of its latents"):
        bare.denormalize(z)
    bare.statistics = scale()
    assert torch.equal(bare.denormalize(z), wrapped.denormalize(z))


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_of_a_trial_stays_on_the_model(name):
    vae = build(name)
    chopgrad.decoder_for(vae)
    assert all(x is None for x in getattr(vae, "_feat_map", []))
    assert "decode" not in vars(vae)


def test_a_fork_that_decodes_otherwise_is_refused():
    vae = build("Wan 2.1")
    cls = type("Fork", (type(vae),), {"decode": lambda self, z, scale: 2 * super(cls, self).decode(z, scale)})
    vae.__class__ = cls
    with pytest.raises(ValueError, match="gives something else than this decoder"):
        chopgrad.decoder_for(vae)


def test_a_fork_of_another_name_is_taken():
    vae = build("Wan 2.1")
    vae.__class__ = type("CausalVideoTokenizer", (type(vae),), {})
    assert isinstance(chopgrad.decoder_for(vae), OriginalWanDecoder)


def test_attention_between_the_blocks_is_told():
    source = module("wan", "modules/vae2_1.py")
    vae = source.WanVAE_(**SMALL, **ONE, attn_scales=[1.0]).eval()
    with pytest.raises(ValueError, match=r"attention between its upsampling blocks \(attn_scales\)"):
        chopgrad.decoder_for(vae)


def test_a_hook_on_what_is_passed_by_is_told():
    vae = build("Wan 2.1")
    decoder = chopgrad.decoder_for(vae)
    vae.decoder.register_forward_hook(lambda *how: None)
    with pytest.raises(ValueError, match="A hook on 'decoder' of the VAE"):
        decoder.decode(latents(2))
