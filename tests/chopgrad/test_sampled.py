"""Sampled losses: unbiased by enumeration of all draws, and no work where no drawn loss reaches."""

import itertools
from statistics import fmean

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from tests.brute_force import Pairwise, relative_error
from tests.chopgrad.test_gradient import TOLERANCE, case, frame_difference
from tests.models import VAES, build, latents_for

INNER = [
    Full(),
    Chop(0),
    Chop(1),
    Chop(2, block=2),
    Chop(1, block=3, recompute=True),
    Exact(offload=False),
    Exact(every=2, pieces=True),
]


def drawn(monkeypatch, order):
    """Let the next draw be the first entries of ``order``."""
    monkeypatch.setattr(
        torch, "randperm", lambda n, **_: torch.tensor([*order, *(i for i in range(n) if i not in order)])
    )


@pytest.mark.parametrize("context_frames", [0, 2])
@pytest.mark.parametrize("strategy", INNER, ids=str)
@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_the_mean_over_all_draws_is_the_strategys_own_gradient(name, strategy, context_frames, monkeypatch):
    vae, z, target = case(name, 4 if name == "wan2.1" else 6, trainable="some")
    loss_fn = frame_difference if context_frames else F.mse_loss
    reference = Pairwise(vae, z, target, loss_fn, context_frames)
    decoder = chopgrad.decoder_for(vae)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    values, gradients = [], []
    for draw in itertools.combinations(range(len(reference.groups)), 2):
        drawn(monkeypatch, draw)
        leaf = z.clone().requires_grad_()
        loss = chopgrad.frame_loss(decoder, leaf, target, loss_fn, Sampled(2, strategy), context_frames=context_frames)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, [leaf, *trained]))
    latents, parameters = reference.expected(strategy)
    assert fmean(values) == pytest.approx(reference.loss.item(), rel=1e-12)
    for got, expected in zip(zip(*gradients, strict=True), [latents, *parameters], strict=True):
        assert relative_error(torch.stack(got).mean(0), expected) < 100 * TOLERANCE


@pytest.mark.parametrize("strategy", INNER, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_drawing_all_groups_is_the_strategy_itself(name, strategy):
    vae, z, target = case(name, 5, trainable=None)
    results = []
    for one in (strategy, Sampled(5, strategy), Sampled(99, strategy)):
        leaf = z.clone().requires_grad_()
        loss = chopgrad.frame_loss(chopgrad.decoder_for(vae), leaf, target, F.mse_loss, one)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-14)
        assert relative_error(gradient, results[0][1]) < TOLERANCE


def test_only_what_a_drawn_loss_needs_is_done(monkeypatch):
    vae, z, target = case("wan2.1", 6, trainable=None)
    decoder = chopgrad.decoder_for(vae)
    steps, graphs, losses = 0, 0, 0
    step = decoder.step

    def counting(z, state):
        nonlocal steps, graphs
        steps, graphs = steps + 1, graphs + torch.is_grad_enabled()
        return step(z, state)

    def loss_fn(frames, target):
        nonlocal losses
        losses += 1
        return F.mse_loss(frames, target)

    decoder.step = counting
    drawn(monkeypatch, [3])
    chopgrad.frame_loss(decoder, z.requires_grad_(), target, loss_fn, Sampled(1, Chop(1))).backward()
    assert (steps, graphs, losses) == (4, 2, 1)
    assert z.grad[:, :, 4:].abs().sum() == 0
    assert z.grad[:, :, :2].abs().sum() == 0
    assert z.grad[:, :, 2:4].abs().sum() > 0


def test_draws_repeat_with_the_seed_and_differ_without():
    torch.manual_seed(3)
    first = [tuple(Sampled(2).weights([0.1] * 10)) for _ in range(5)]
    torch.manual_seed(3)
    assert first == [tuple(Sampled(2).weights([0.1] * 10)) for _ in range(5)]
    assert len(set(first)) > 1


def test_without_gradient_the_value_is_the_same_estimate():
    vae, z, target = case("cogvideox", 6, trainable=None)
    decoder = chopgrad.decoder_for(vae)
    torch.manual_seed(0)
    with torch.no_grad():
        value = chopgrad.frame_loss(decoder, z, target, F.mse_loss, Sampled(1))
    torch.manual_seed(0)
    again = chopgrad.frame_loss(decoder, z.requires_grad_(), target, F.mse_loss, Sampled(1))
    assert value.item() == pytest.approx(again.item(), rel=1e-14)


def test_bad_settings():
    with pytest.raises(ValueError, match="Sampled: count must be at least 1, got 0"):
        Sampled(0)
    with pytest.raises(TypeError, match=r"Sampled: strategy must be Full\(\), Chop\(...\) or Exact\(...\), got 3"):
        Sampled(2, 3)
    with pytest.raises(TypeError, match="strategy must be"):
        Sampled(1, Sampled(1))


def test_memory_of_groups_out_of_reach_is_not_taken(monkeypatch):
    from chopgrad.memory import PeakMemory

    vae = build("wan2.1")
    z = latents_for(vae, 12).requires_grad_()
    decoder = chopgrad.decoder_for(vae)
    target = torch.zeros_like(decoder.decode(z.detach()))

    def peak(strategy):
        drawn(monkeypatch, [11])
        with PeakMemory() as memory:
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).backward()
        return memory.peak_bytes

    assert peak(Sampled(1, Chop(0))) <= 1.02 * peak(Chop(0))
    assert peak(Sampled(1, Chop(1, recompute=True))) <= 1.02 * peak(Chop(1, recompute=True))
