"""K-VAE and the VAE of Kandinsky 6's super-resolution, whose caches upstream changes in place in nested dicts."""

import pytest
import torch

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.models import MORE, build, latents_for


def built(name, dtype=torch.float64):
    if name not in MORE:
        pytest.skip(f"this diffusers has no {name}")
    return build(name, dtype)


def frames_and_gradient(decode, z):
    leaf = z.clone().requires_grad_()
    frames = decode(leaf)
    return frames.detach(), torch.autograd.grad(frames.double().square().mean(), leaf)[0]


def gradient(decode, z):
    return frames_and_gradient(decode, z)[1]


@pytest.mark.parametrize("name", ["kvae", "kandinsky6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_good_as_its_own_decode(name, dtype):
    vae, double = built(name, dtype), built(name)
    for p, of_vae in zip(double.parameters(), vae.parameters(), strict=True):
        p.copy_(of_vae)
    z, decoder = latents_for(vae, 6), chopgrad.decoder_for(vae)
    expected = frames_and_gradient(lambda z: double.decode(z).sample, z.double())
    stock = frames_and_gradient(lambda z: vae.decode(z).sample, z)
    for strategy in (Exact(offload=False), Exact(pieces=True)):
        ours = frames_and_gradient(lambda z, strategy=strategy: chopgrad.decode(decoder, z, strategy), z)
        for a, b, c in zip(ours, stock, expected, strict=True):
            assert a.dtype == dtype
            assert relative_error(a.double(), c) < 2 * relative_error(b.double(), c)


def test_a_last_segment_of_one_latent_is_one_frame_as_upstream():
    vae = built("kvae")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 6)
    assert [g.frame_count for g in decoder.frame_groups(6)] == [17, 1]
    assert [g.frame_count for g in decoder.frame_groups(7)] == [17, 8]
    assert vae.decode(z).sample.shape[2] == decoder.frame_count(6) == 18
    expected = gradient(lambda z: vae.decode(z).sample, z)
    assert relative_error(gradient(lambda z: chopgrad.decode(decoder, z, Exact(offload=False)), z), expected) < 1e-12


def test_segments_that_would_not_fit_are_told():
    vae = built("kvae")
    vae.register_to_config(temporal_compress_times=3)
    with pytest.raises(ValueError, match="temporal_compress_times must divide 16"):
        chopgrad.decoder_for(vae)


def test_more_compression_in_time_makes_segments_of_fewer_latents():
    vae = built("kvae")
    vae = type(vae)(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=0, z_channels=4, temporal_compress_times=8)
    vae = vae.double().requires_grad_(False)
    decoder = chopgrad.decoder_for(vae)
    assert [(g.latents.stop - g.latents.start, g.frame_count) for g in decoder.frame_groups(6)] == [
        (3, 17),
        (2, 16),
        (1, 1),
    ]
    z = latents_for(vae, 4)
    assert relative_error(decoder.decode(z), vae.decode(z).sample) < 1e-14


def test_a_flag_that_upstream_does_not_read_changes_nothing():
    vae = built("kvae")
    z = latents_for(vae, 2)
    expected = vae.decode(z).sample
    vae.enable_tiling()
    assert torch.equal(vae.decode(z).sample, expected)
    assert torch.equal(chopgrad.decoder_for(vae).decode(z), expected)


def test_the_gradient_is_right_where_upstream_checkpoints():
    vae = built("kvae")
    z = latents_for(vae, 6)
    expected = gradient(lambda z: vae.decode(z).sample, z)
    vae.enable_gradient_checkpointing()  # upstream's second pass reads caches that the first has changed
    decoder = chopgrad.decoder_for(vae)
    assert relative_error(gradient(lambda z: chopgrad.decode(decoder, z, Exact(offload=False)), z), expected) < 1e-12


def test_kandinsky6_needs_no_segments():
    """One latent per group, where upstream decodes five and then four at a time."""
    vae = built("kandinsky6")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 6)
    assert [g.frame_count for g in decoder.frame_groups(6)] == [1, 4, 4, 4, 4, 4]
    assert relative_error(decoder.decode(z), vae.decode(z).sample) < 1e-14
    target = torch.zeros_like(vae.decode(z).sample)
    expected = gradient(lambda z: vae.decode(z).sample, z)
    leaf = z.clone().requires_grad_()
    loss = chopgrad.frame_loss(decoder, leaf, target, torch.nn.functional.mse_loss, Chop(9, block=1))
    assert relative_error(torch.autograd.grad(loss, leaf)[0], expected) < 1e-12


def test_latents_are_scaled_as_the_pipelines_do_it():
    vae = built("kandinsky6")
    z = latents_for(vae, 2)
    decoder = chopgrad.decoder_for(vae)
    assert torch.equal(decoder.denormalize(z), z / vae.config.scaling_factor)
    kvae = chopgrad.decoder_for(built("kvae"))
    assert torch.equal(kvae.denormalize(z), z)


def test_the_kit_finds_nothing():
    check_decoder(chopgrad.decoder_for(built("kandinsky6")), latent_frames=2)


@pytest.mark.parametrize("name", [name for name in ("kvae", "kandinsky6") if name in MORE])
def test_under_autocast_frames_are_those_of_its_own_decode(name):
    vae = build(name, torch.float32)
    z = latents_for(vae, 6).requires_grad_()
    decoder = chopgrad.decoder_for(vae)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = decoder.own_decode(z)
        for strategy in (Full(), Exact(pieces=True)):
            ours = chopgrad.decode(decoder, z, strategy)
            assert ours.dtype == theirs.dtype
            assert relative_error(ours.detach(), theirs.detach()) < 0.02  # of bfloat16
