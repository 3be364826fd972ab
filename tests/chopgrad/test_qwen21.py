"""Qwen-Image 2.1: images, whose decoder is walked piece by piece."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.models import KEEP_DTYPE, latents_for

if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
    pytest.skip("this diffusers has no AutoencoderKLQwenImage21", allow_module_level=True)

KINDS = [{}, {"is_residual": False}, {"patch_size": 2, "in_channels": 12, "out_channels": 12}]


def made(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
        **settings,
    )  # fmt: skip
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for module in vae.modules() if dtype is torch.float64 else []:
        module.__class__ = KEEP_DTYPE.get(type(module).__name__, type(module))
    return vae.to(dtype).eval()


@pytest.mark.filterwarnings("ignore:.*parameters of the decoder")
@pytest.mark.parametrize("settings", KINDS)
def test_frames_and_gradients_are_those_of_its_own_decode(settings):
    vae = made(**settings)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 1, batch=2).requires_grad_()
    parameters = list(decoder.parameters())
    theirs = vae.decode(z).sample
    target = torch.zeros_like(theirs)
    plain = torch.autograd.grad(F.mse_loss(theirs, target), [z, *parameters], allow_unused=True)
    for strategy in (Full(), Exact(offload=False), Exact(pieces=True), Chop(1)):
        for ours in (
            F.mse_loss(chopgrad.decode(decoder, z, strategy), target),
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy),
        ):
            found = torch.autograd.grad(ours, [z, *parameters], allow_unused=True)
            for a, b in zip(found, plain, strict=True):
                assert b is None or relative_error(a, b) < 1e-11


def test_the_kit_finds_nothing():
    check_decoder(chopgrad.decoder_for(made()), 1)


def test_a_video_is_told():
    decoder = chopgrad.decoder_for(made())
    with pytest.raises(ValueError, match="decodes images, one latent each, and not videos: got 3 latents"):
        decoder.decode(latents_for(decoder.vae, 3))


def test_a_changed_decoder_is_found_by_the_trial():
    vae = made()
    vae.decoder.up_blocks[0].register_forward_hook(lambda module, given, y: 2 * y)
    with pytest.raises(ValueError, match="gives something else than this decoder"):
        chopgrad.decoder_for(vae)


def test_bfloat16_is_as_near_as_the_vae_itself():
    exact_vae, vae = made(), made(torch.bfloat16)
    z = latents_for(exact_vae, 1)
    with torch.no_grad():
        exact = exact_vae.decode(z).sample
        stock, ours = vae.decode(z.bfloat16()).sample, chopgrad.decoder_for(vae).decode(z.bfloat16())
    assert relative_error(ours.double(), exact) <= 2 * relative_error(stock.double(), exact)
