"""VidTok: frames that wait for the next latent, what is not reproduced, indices, and what upstream keeps on modules."""

import pytest
import torch
from torch import nn

import chopgrad
from chopgrad import Chop, Exact
from chopgrad.decoders import VidTokDecoder
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.models import KEEP_DTYPE, build, latents_for

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "AutoencoderVidTok"):
    pytest.skip("this diffusers has no AutoencoderVidTok", allow_module_level=True)

SMALL = {"ch": 4, "z_channels": 4, "num_res_blocks": 0}
TWICE = {"ch_mult": [1, 2], "spatial_ds": [0], "spatial_us": [1], "tempo_ds": [0], "tempo_us": [1]}
EIGHT = {
    "ch_mult": [1, 1, 2, 2], "spatial_ds": [0, 1, 2], "spatial_us": [1, 2, 3], "tempo_ds": [0, 1, 2],
    "tempo_us": [1, 2, 3],
}  # fmt: skip
QUANTISED = TWICE | {"regularizer": "fsq", "double_z": False, "codebook_size": 4096}


def made(**settings):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderVidTok(**SMALL | settings).double().eval().requires_grad_(False)
    for module in vae.modules():
        module.__class__ = KEEP_DTYPE.get(type(module).__name__, type(module))
    return vae


def tensors_on(vae):
    return [name for name, m in vae.named_modules() if getattr(m, "causal_cache", None) is not None]


def test_the_kit_finds_nothing():
    check_decoder(chopgrad.decoder_for(build("vidtok")), 3)


@pytest.mark.parametrize("settings", [TWICE, EIGHT, QUANTISED])
def test_any_compression_in_time(settings):
    vae = made(**settings)
    decoder = chopgrad.decoder_for(vae)
    for count in (1, 2, 3, 5):
        z = latents_for(vae, count).requires_grad_()
        theirs, ours = decoder.own_decode(z), chopgrad.decode(decoder, z, Exact(pieces=True))
        assert ours.shape == theirs.shape
        assert relative_error(ours.detach(), theirs.detach()) < 1e-13
        of_theirs, of_ours = (torch.autograd.grad(x.square().mean(), z)[0] for x in (theirs, ours))
        assert relative_error(of_ours, of_theirs) < 1e-12


def test_frames_wait_for_the_latent_that_settles_them():
    decoder = chopgrad.decoder_for(build("vidtok"))
    assert [g.frame_count for g in decoder.frame_groups(1)] == [1]
    assert [g.frame_count for g in decoder.frame_groups(2)] == [1, 4]
    assert [g.frame_count for g in decoder.frame_groups(5)] == [1, 1, 4, 4, 7]
    assert decoder.frame_groups(5)[-1].latents == slice(3, 5)


def test_the_latent_that_is_not_read_gets_no_gradient_from_the_last_group():
    decoder = chopgrad.decoder_for(build("vidtok"))
    z = latents_for(decoder.vae, 4).requires_grad_()
    chopgrad.decode(decoder, z, Chop(0))[:, :, -7:].sum().backward()
    assert z.grad[:, :, 3].norm() > 0
    assert z.grad[:, :, :3].norm() == 0


def test_nothing_stays_on_modules_also_after_an_exception():
    vae = build("vidtok")
    decoder = chopgrad.decoder_for(vae)
    assert not tensors_on(vae)
    z = latents_for(vae, 3).requires_grad_()
    chopgrad.decode(decoder, z, Exact(offload=False)).sum().backward()
    assert not tensors_on(vae)
    vae.decode(z)
    assert tensors_on(vae)  # as upstream has it
    with pytest.raises(RuntimeError):
        decoder.own_decode(torch.cat([z, z], dim=1))  # too many channels
    assert not tensors_on(vae)


def test_indices_decode_where_the_vae_is_patched():
    vae = made(**QUANTISED).float()  # upstream looks codes up in float32, whatever the weights are in
    indices = torch.randint(0, 4096, (2, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    theirs = vae.decode(indices, decode_from_indices=True)
    for sliced in (False, True):
        vae.use_slicing = sliced
        with chopgrad.patch(vae):
            assert relative_error(vae.decode(indices, decode_from_indices=True), theirs) < 1e-6


def test_tiles_are_told():
    vae = build("vidtok")
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"vae.disable_tiling\(\)"):
        chopgrad.decoder_for(vae)


def test_a_vidtok_that_is_not_causal_is_told():
    with pytest.raises(ValueError, match=r"not causal \(is_causal=False\)"):
        chopgrad.decoder_for(made(**TWICE, is_causal=False))


UNEVEN = {"ch_mult": [1, 2, 2], "tempo_us": [1, 2]}  # the innermost level is not upsampled in space


@pytest.mark.parametrize("settings", [{"tempo_us": []}, UNEVEN])
def test_levels_that_do_not_fit_are_told(settings):
    with pytest.raises(ValueError, match="as many levels"):
        chopgrad.decoder_for(made(**TWICE | settings))


def test_a_hook_on_a_causal_convolution_is_told():
    vae = build("vidtok")
    decoder = chopgrad.decoder_for(vae)
    vae.decoder.conv_in.register_forward_hook(lambda *how: None)
    with pytest.raises(ValueError, match=r"A hook on 'decoder\.conv_in'"):
        decoder.decode(latents_for(vae, 2))


def test_lower_precision_is_as_near_as_the_vae_itself():
    z = latents_for(build("vidtok"), 4)
    with torch.no_grad():
        exact = build("vidtok").decode(z)
        for dtype in (torch.float32, torch.bfloat16):
            vae = build("vidtok", dtype)
            stock, ours = vae.decode(z.to(dtype)), chopgrad.decoder_for(vae).decode(z.to(dtype))
            assert relative_error(ours.double(), exact) <= 2 * relative_error(stock.double(), exact)


def test_float64_is_not_rounded_to_float32_as_upstream_does():
    vae = build("vidtok", torch.float32).double()
    assert not any(isinstance(m, nn.Module) and type(m) in KEEP_DTYPE.values() for m in vae.modules())
    z = latents_for(vae, 3)
    assert 0 < relative_error(VidTokDecoder(vae).decode(z), vae.decode(z)) < 1e-5
