"""The pairwise gradients of the analyses against brute force, and their masks against the library."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop
from suite.pairwise import pairwise_gradients, truncated
from tests import elsewhere
from tests.brute_force import Pairwise, relative_error
from tests.models import VAES, build, latents_for


@pytest.mark.parametrize("latent_frames", [1, 4, 5])
@pytest.mark.parametrize("name", VAES)
def test_pairwise_gradients(name, latent_frames):
    vae = build(name)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, latent_frames)
    with torch.no_grad():
        target = torch.randn_like(decoder.decode(z))
    squared, absolute = pairwise_gradients(decoder, z, target, [F.mse_loss, F.l1_loss])
    groups = decoder.frame_groups(latent_frames)
    for pairs, loss_fn in ((squared, F.mse_loss), (absolute, F.l1_loss)):
        reference = Pairwise(vae, z, target, loss_fn)
        for i in range(len(groups)):
            for j, group in enumerate(groups):
                expected = reference.dz[i][j] if j <= i else torch.zeros_like(z[:, :, group.latents])
                got = pairs[i, j][:, :, : expected.shape[2]]
                assert relative_error(got, expected) < 1e-12
                assert not pairs[i, j][:, :, expected.shape[2] :].any()  # beyond the latents of a shorter group
    for distance, block in ((0, 1), (1, 1), (1, 2), (0, 3), (len(groups), 1)):
        leaf = z.clone().requires_grad_()
        chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, Chop(distance, block)).backward()
        masked = truncated(squared, distance, block)
        for part, group in zip(masked, groups, strict=True):
            gradient = leaf.grad[:, :, group.latents]
            assert relative_error(part[:, :, : gradient.shape[2]], gradient) < 1e-12


def test_the_mask_of_a_truncation():
    """Each pair a power of two (those against causality too): the sum tells which pairs were kept."""
    count = 6
    pairs = (2.0 ** torch.arange(count, dtype=torch.float64))[:, None, None].expand(count, count, 1)
    kept = lambda *truncation: [int(x) for x in truncated(pairs, *truncation).flatten()]  # noqa: E731
    assert kept(0) == [0b000001, 0b000010, 0b000100, 0b001000, 0b010000, 0b100000]
    assert kept(2) == [0b000111, 0b001110, 0b011100, 0b111000, 0b110000, 0b100000]
    assert kept(0, 3) == [0b000111, 0b000110, 0b000100, 0b111000, 0b110000, 0b100000]
    assert kept(1, 4) == [0b011111, 0b011110, 0b011100, 0b011000, 0b110000, 0b100000]
    assert kept(count) == kept(0, count) == [0b111111, 0b111110, 0b111100, 0b111000, 0b110000, 0b100000]


def test_a_truncation_stays_on_the_device_of_its_gradients():
    with elsewhere.strict():
        pairs = torch.zeros(3, 3, 2, device=elsewhere.DEVICE)
        assert truncated(pairs, 1).is_meta and truncated(pairs, 1, 1, [0.0, 3.0, 0.0]).is_meta
