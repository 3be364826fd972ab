"""(g) In bfloat16 the gradient is at most twice as far from float32 as stock bfloat16 back-propagation is."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for


def gradient(name, dtype, differentiate):
    vae = build(name, dtype)
    leaf = latents_for(build(name, torch.float32), 5).to(dtype).requires_grad_()
    decoder = chopgrad.decoder_for(vae)
    with torch.no_grad():
        shape = decoder.decode(leaf).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.autograd.grad(differentiate(decoder, leaf, target), leaf)[0].float()


@pytest.mark.parametrize(
    "strategy",
    [Full(), Exact(offload=False), Exact(pieces=True), Chop(5), Chop(5, recompute=True), Chop(2, block=3)],
    ids=str,
)
@pytest.mark.parametrize("name", VAES)
def test_exact_strategies_in_bfloat16(name, strategy):
    def plain(decoder, leaf, target):
        return F.mse_loss(decoder.vae.decode(leaf).sample, target)

    def ours(decoder, leaf, target):
        return chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)

    exact = gradient(name, torch.float32, plain)
    stock = relative_error(gradient(name, torch.bfloat16, plain), exact)
    assert 0 < relative_error(gradient(name, torch.bfloat16, ours), exact) < 2 * stock


@pytest.mark.parametrize("strategy", [Chop(0), Chop(1), Chop(1, block=2), Chop(1, block=2, recompute=True)], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_truncated_strategies_in_bfloat16(name, strategy):
    def plain(decoder, leaf, target):
        return F.mse_loss(decoder.vae.decode(leaf).sample, target)

    def ours(decoder, leaf, target):
        return chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)

    stock = relative_error(gradient(name, torch.bfloat16, plain), gradient(name, torch.float32, plain))
    error = relative_error(gradient(name, torch.bfloat16, ours), gradient(name, torch.float32, ours))
    assert 0 < error < 2 * stock
