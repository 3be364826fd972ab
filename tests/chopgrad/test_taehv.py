"""Tiny video decoders of the structure of TAEHV: recognised by it, trimmed as it trims."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.decoders import TAEHVDecoder
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.tiny_video_vae import TinyVideoVAE

KINDS = {
    "four frames": {},
    "eight frames, patches": {"grows": (2, 2, 2), "patch_size": 2},
    "no growth": {"grows": (1, 1)},
    "CogVideoX": {"is_cogvideox": True},
}


def made(**settings):
    torch.manual_seed(0)
    vae = TinyVideoVAE(**settings).double()
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(2)
        vae.decoder[-1].weight.mul_(4)  # some pixels are beyond [0, 1]
    return vae


def latents(count, batch=1):
    return torch.randn(batch, 4, count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.*parameters of the decoder")
@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_gradients_are_those_of_decode_video(kind):
    vae = made(**KINDS[kind])
    decoder = chopgrad.decoder_for(vae)
    assert isinstance(decoder, TAEHVDecoder)
    parameters = list(decoder.parameters())
    for count, batch in ((1, 1), (2, 1), (3, 2), (6, 1)):
        z = latents(count, batch).requires_grad_()
        theirs = vae.decode_video(z.transpose(1, 2)).transpose(1, 2)
        assert 0.01 < ((theirs > 0) & (theirs < 1)).double().mean() < 1
        target = torch.zeros_like(theirs)
        plain = torch.autograd.grad(F.mse_loss(theirs, target), [z, *parameters])
        for strategy in (Full(), Exact(offload=False), Exact(pieces=True), Chop(9, block=2)):
            ours = chopgrad.decode(decoder, z, strategy)
            assert relative_error(ours.detach(), theirs.detach()) < 1e-13
            for loss in (F.mse_loss(ours, target), chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy)):
                for a, b in zip(torch.autograd.grad(loss, [z, *parameters]), plain, strict=True):
                    assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_the_kit_finds_nothing(kind):
    check_decoder(chopgrad.decoder_for(made(**KINDS[kind])), 4)


def test_cogvideox_keeps_all_frames_of_an_even_number_of_latents():
    decoder = chopgrad.decoder_for(made(is_cogvideox=True))
    assert [g.frame_count for g in decoder.frame_groups(1)] == [1]
    assert [g.frame_count for g in decoder.frame_groups(3)] == [1, 8]
    assert [g.frame_count for g in decoder.frame_groups(4)] == [8, 8]


def test_the_clamp_can_be_left_out():
    vae = made()
    z = latents(2)
    clamped, free = chopgrad.decoder_for(vae).decode(z), chopgrad.decoder_for(vae, clamp=False).decode(z)
    assert free.min() < 0
    assert torch.equal(free.clamp(0, 1), clamped)


def test_a_class_of_another_name_is_taken_and_proven():
    vae = made()
    vae.__class__ = type("Preview", (TinyVideoVAE,), {})
    assert isinstance(chopgrad.decoder_for(vae), TAEHVDecoder)
    vae.__class__ = type("Fork", (TinyVideoVAE,), {"decode_video": lambda self, x, **how: 1 - made().decode_video(x)})
    with pytest.raises(ValueError, match="gives something else than this decoder"):
        chopgrad.decoder_for(vae)


def test_what_enters_a_piece_is_not_changed_in_place():
    vae = made()
    vae.decoder = nn.Sequential(nn.ReLU(inplace=True), *vae.decoder[1:])
    decoder, z = chopgrad.decoder_for(vae), latents(3)
    before = z.clone()
    with torch.no_grad():
        theirs = decoder.own_decode(z.clone())
        assert relative_error(decoder.decode(z), theirs) < 1e-13
    assert torch.equal(z, before)


def test_taeh3_is_told():
    vae = made()
    vae.is_h3 = True
    with pytest.raises(ValueError, match="TAEH3 drops frames every five latents"):
        chopgrad.decoder_for(vae)
