"""Mochi: what ``drop_last_temporal_frames`` and frame-wise decoding mean, and what the pipeline does to latents."""

import pytest
import torch

import chopgrad
from chopgrad import Exact
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.models import build, latents_for


def test_the_kit_finds_nothing():
    check_decoder(chopgrad.decoder_for(build("mochi")), 3)


def test_all_frames_of_the_first_latent_are_kept_where_the_vae_keeps_them():
    vae, z = build("mochi"), latents_for(build("mochi"), 3)
    decoder = chopgrad.decoder_for(vae)
    assert [g.frame_count for g in decoder.frame_groups(3)] == [1, 2, 2]
    vae.drop_last_temporal_frames = False
    assert [g.frame_count for g in decoder.frame_groups(3)] == [2, 2, 2]
    z.requires_grad_()
    theirs, ours = vae.decode(z).sample, chopgrad.decode(decoder, z, Exact(pieces=True))
    assert relative_error(ours.detach(), theirs.detach()) < 1e-13
    of_theirs, of_ours = (torch.autograd.grad(x.square().mean(), z)[0] for x in (theirs, ours))
    assert relative_error(of_ours, of_theirs) < 1e-12


def test_frame_wise_decoding_is_told():
    vae = build("mochi")
    decoder = chopgrad.decoder_for(vae)
    vae.use_framewise_decoding = True
    with pytest.raises(ValueError, match=r"frame-wise \(_enable_framewise_decoding\).*load it again"):
        decoder.decode(latents_for(vae, 2))
    vae._enable_framewise_decoding()
    vae.use_framewise_decoding = False  # the convolutions' padding is still that of frame-wise decoding
    with pytest.raises(ValueError, match="load it again"):
        chopgrad.decoder_for(vae)


def test_tiles_are_told():
    vae = build("mochi")
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"vae.disable_tiling\(\)"):
        chopgrad.decoder_for(vae)


def test_latents_are_denormalised_as_by_the_pipeline():
    vae = build("mochi")
    decoder, z = chopgrad.decoder_for(vae), latents_for(build("mochi"), 2)
    mean, std = (torch.tensor(x).double().view(1, -1, 1, 1, 1) for x in ([0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]))
    assert relative_error(decoder.denormalize(z), z * std / 1.3 + mean) < 1e-7  # statistics are float32 there
    vae.register_to_config(latents_mean=None, latents_std=None)
    assert torch.equal(decoder.denormalize(z), z / 1.3)


def test_a_hook_on_a_causal_convolution_is_told():
    vae = build("mochi")
    decoder = chopgrad.decoder_for(vae)
    vae.decoder.block_in.resnets[0].conv1.register_forward_hook(lambda *how: None)
    with pytest.raises(ValueError, match=r"A hook on 'decoder\.block_in\.resnets\.0\.conv1'"):
        decoder.decode(latents_for(vae, 2))


def test_bfloat16_is_as_near_as_the_vae_itself():
    z = latents_for(build("mochi"), 4)
    with torch.no_grad():
        exact = build("mochi").decode(z).sample
        vae = build("mochi", torch.bfloat16)
        stock, ours = vae.decode(z.bfloat16()).sample, chopgrad.decoder_for(vae).decode(z.bfloat16())
    assert relative_error(ours.double(), exact) <= 2 * relative_error(stock.double(), exact)
