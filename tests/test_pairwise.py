"""The pairwise gradients of the analyses against brute force, and their masks against the library."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop
from suite.pairwise import pairwise_gradients, truncated
from tests.brute_force import Pairwise, relative_error
from tests.models import VAES, build, latents_for


@pytest.mark.parametrize("latent_frames", [4, 5])
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
            for j in range(len(groups)):
                expected = reference.dz[i][j] if j <= i else torch.zeros_like(pairs[i, j])
                got = pairs[i, j][:, :, : expected.shape[2]]
                assert relative_error(got, expected) < 1e-12
    for distance, block in ((0, 1), (1, 1), (1, 2), (0, 3), (len(groups), 1)):
        leaf = z.clone().requires_grad_()
        chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, Chop(distance, block)).backward()
        masked = truncated(squared, distance, block)
        for part, group in zip(masked, groups, strict=True):
            gradient = leaf.grad[:, :, group.latents]
            assert relative_error(part[:, :, : gradient.shape[2]], gradient) < 1e-12
