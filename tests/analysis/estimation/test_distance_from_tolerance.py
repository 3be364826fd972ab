"""Adaptive distance: known decays give the known distance, and the realised error keeps the tolerance."""

import math

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from analysis.estimation.distance_from_tolerance import Adaptive, Decay, probe
from chopgrad import Chop, Full
from suite.pairwise import pairwise_gradients
from tests.brute_force import relative_error
from tests.linear_decoder import LinearDecoder
from tests.models import build, latents_for


def observed(norms, gradient=None):
    decay = Decay()
    decay.add_probe(norms)
    if gradient is not None:
        decay.gradient.add(gradient)
    return decay


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
def test_a_geometric_decay_is_recognised_and_extrapolated(beta):
    decay = observed([beta**d for d in range(6)], gradient=1.0)
    assert decay.rate() == pytest.approx(beta)
    whole = observed([beta**d for d in range(40)], gradient=1.0)
    for distance in (0, 2, 8):
        assert decay.relative_error(distance, 1, 40) == pytest.approx(whole.relative_error(distance, 1, 40))


def test_the_bound_is_the_tail_over_what_is_left():
    decay = observed([1.0, 0.1, 0.01, 0.0], gradient=4.0)
    # At D = 0 the tails of the four groups, first to last: .11, .11, .1, 0.
    tail = math.sqrt((0.11**2 + 0.11**2 + 0.1**2) / 4)
    assert decay.relative_error(0, 1, 4) == pytest.approx(tail / (2 - tail))
    assert decay.relative_error(3, 1, 4) == 0
    # In blocks of two every first group sees one group further.
    tail = math.sqrt((0.01**2 + 0.11**2 + 0.0**2 + 0.0**2) / 4)
    assert decay.relative_error(0, 2, 4) == pytest.approx(tail / (2 - tail))


def test_no_decay_gives_no_bound():
    assert observed([1.0] * 5, gradient=1.0).relative_error(0, 1, 10) == math.inf


def test_running_means_forget():
    decay = observed([1.0, 1.0])
    for _ in range(200):
        decay.add_probe([1.0, 0.1])
    assert decay.squares[1].value == pytest.approx(0.01, rel=1e-3)
    decay.add_probe([math.nan, 1.0])
    assert decay.squares[1].value == pytest.approx(0.01, rel=1e-3)


def gradient(decoder, z, target, strategy):
    if isinstance(strategy, Adaptive):
        return strategy.loss_gradient(decoder, z, target, F.mse_loss)[1]
    leaf = z.clone().requires_grad_()
    chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy).backward()
    return leaf.grad


@pytest.mark.parametrize("block", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rho", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 0.003])
def test_the_error_stays_within_the_tolerance_and_the_distance_is_not_wasted(rho, tolerance, block):
    torch.manual_seed(0)
    decoder = LinearDecoder(rho)
    z, target = torch.randn(1, 4, 24, 1, 1).double(), torch.randn(1, 3, 24, 1, 1).double()
    exact = gradient(decoder, z, target, Full())
    strategy = Adaptive(tolerance, block=block, probe_every=1)
    errors = [relative_error(gradient(decoder, z, target, strategy), exact) for _ in range(16)]
    allowed = 1.2 * tolerance  # an estimate from some groups is exceeded by a little now and then
    assert max(errors[-6:]) <= allowed
    at = (relative_error(gradient(decoder, z, target, Chop(d, block)), exact) for d in range(24))
    enough, chosen = next(d for d, error in enumerate(at) if error <= allowed), strategy.distance(24)
    assert enough <= chosen <= enough + math.ceil(math.log(10) / -math.log(rho))  # tight to a factor of ten in error


def finite_without_gradient(frames, target):
    return F.mse_loss(frames, target) + (0 * frames.sum()).sqrt()


def test_a_gradient_that_is_not_finite_is_forgotten():
    decoder = LinearDecoder(0.6)
    z, target = torch.randn(1, 4, 12, 1, 1).double(), torch.randn(1, 3, 12, 1, 1).double()
    strategy, undisturbed = Adaptive(0.01, probe_every=1), Adaptive(0.01, probe_every=1)
    gradient(decoder, z, target, undisturbed)
    gradient(decoder, z, target, strategy)
    _, found = strategy.loss_gradient(decoder, z, target, finite_without_gradient)
    assert found.isnan().any()
    assert strategy.decay.norms == undisturbed.decay.norms
    assert strategy.decay.gradient.value == undisturbed.decay.gradient.value
    assert strategy.distance(12) == undisturbed.distance(12)


def test_the_limit_and_short_videos():
    decoder = LinearDecoder(0.99)
    z, target = torch.randn(1, 4, 10, 1, 1).double(), torch.randn(1, 3, 10, 1, 1).double()
    strategy = Adaptive(1e-6, most=2)
    gradient(decoder, z, target, strategy)
    assert strategy.distance(10) == 2
    assert len(strategy.decay.squares) == 4  # one beyond the limit, to see whether it binds
    one = gradient(decoder, z[:, :, :1], target[:, :, :1], Adaptive(0.1))
    assert torch.isfinite(one).all()


@pytest.mark.parametrize(("name", "i", "span"), [("wan2.1", 3, 2), ("wan2.1", 2, 2), ("cogvideox", 1, 1)])
def test_a_probe_is_the_gradient_of_one_groups_loss(name, i, span):
    vae = build(name)
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 4)
    target = torch.zeros_like(decoder.decode(z))
    (pairs,) = pairwise_gradients(decoder, z, target, [F.mse_loss])
    expected = [pairs[i, i - d].norm().item() for d in range(span + 1)]
    assert probe(decoder, z, target, F.mse_loss, i, span) == pytest.approx(expected, rel=1e-5)  # norms are in float32


def test_the_value_does_not_depend_on_the_distance():
    vae = build("wan2.1")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 4)
    target = torch.zeros_like(decoder.decode(z))
    plain = chopgrad.frame_loss(decoder, z, target, F.mse_loss, Full())
    strategy = Adaptive(0.1)
    loss, found = strategy.loss_gradient(decoder, z, target, F.mse_loss)
    assert loss.item() == plain.item()
    assert strategy.decay.calls == 1
    assert torch.equal(found, gradient(decoder, z, target, strategy.at(strategy.distance(4))))


def test_bad_settings():
    for bad in (0, -1, math.inf, "small"):
        with pytest.raises(ValueError, match="Adaptive: tolerance must be a positive number"):
            Adaptive(bad)
    with pytest.raises(ValueError, match="Adaptive: most must be at least 0, got -1"):
        Adaptive(0.1, most=-1)
    with pytest.raises(ValueError, match="Adaptive: probe_every must be at least 1, got 0"):
        Adaptive(0.1, probe_every=0)
    with pytest.raises(ValueError, match="Chop: block must be at least 1, got 0"):
        Adaptive(0.1, block=0)
