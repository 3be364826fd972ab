"""Every supported class: the VAE's own decode and plain back-propagation through it are the reference, in float64."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.brute_force import Pairwise, relative_error
from tests.models import MORE, build

STRATEGIES = [Full(), Exact(every=2), Exact(pieces=True), Chop(9), Chop(9, block=2, recompute=True, pieces=True)]
LENGTHS = range(1, 10)


def made(name, trainable=False):
    vae = build(name).requires_grad_(trainable)
    return vae, chopgrad.decoder_for(vae)


def source(decoder, count, batch=1):
    return torch.randn(
        (batch, decoder.latent_channels, count, decoder.trial_size, decoder.trial_size),
        generator=torch.Generator().manual_seed(1), dtype=torch.float64,
    )  # fmt: skip


def lengths(decoder, candidates=LENGTHS):
    """Those that this decoder takes."""
    for count in candidates:
        try:
            decoder.frame_groups(count)
        except ValueError:
            continue
        yield count


def gradients(y, z, parameters):
    found = torch.autograd.grad(y, [z, *parameters], allow_unused=True, materialize_grads=True)
    return [x.detach() for x in found]


def agree(found, expected):
    scale = max(x.norm() for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), 1e-4 * scale)


def supported(strategy, decoder):
    """Whether it can be taken apart, where the strategy asks for it."""
    if not strategy.plan().pieces:
        return True
    try:
        decoder.pieces()
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("name", MORE)
def test_frames_are_those_of_its_own_decode(name):
    _, decoder = made(name)
    seen = list(lengths(decoder))
    assert len(seen) >= 3
    for count in seen:
        z = source(decoder, count, batch=2 if count == seen[-1] else 1)
        with torch.no_grad():
            theirs = decoder.own_decode(z)
            for ours in (decoder.decode(z), chopgrad.decode(decoder, z)):
                assert ours.shape == theirs.shape
                assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", MORE)
def test_gradients_are_those_of_plain_back_propagation(name, trainable):
    vae, decoder = made(name, trainable)
    counts = list(lengths(decoder))
    for count, batch in ((counts[0], 1), (counts[-1] if not trainable else counts[len(counts) // 2], 2)):
        z = source(decoder, count, batch).requires_grad_()
        theirs = decoder.own_decode(z)
        target = torch.zeros_like(theirs)
        parameters = list(decoder.parameters()) if trainable else []
        plain = gradients(F.mse_loss(theirs, target), z, parameters)
        for strategy in STRATEGIES:
            if not supported(strategy, decoder):
                continue
            leaf = z.detach().clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # parameters get gradients, too
                agree(gradients(F.mse_loss(chopgrad.decode(decoder, leaf, strategy), target), leaf, parameters), plain)
                loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
                agree(gradients(loss, leaf, parameters), plain)
    if not hasattr(vae, "decode"):
        with pytest.raises(ValueError, match="has no decode to stand in for"):
            chopgrad.patch(vae)
        return
    with chopgrad.patch(vae, Exact(offload=False)):
        leaf = z.detach().clone().requires_grad_()
        frames = vae.decode(leaf)
        frames = getattr(frames, "sample", frames)  # VidTok's decode returns a tensor
        agree(gradients(F.mse_loss(frames, torch.zeros_like(frames)), leaf, parameters), plain)


@pytest.mark.parametrize("name", MORE)
def test_truncated_gradients_are_those_of_brute_force(name):
    vae, decoder = made(name)
    count = next((n for n in lengths(decoder, range(1, 17)) if len(decoder.frame_groups(n)) == 3), None)
    assert count is not None
    z = source(decoder, count)
    target = torch.zeros_like(decoder.decode(z))
    pairwise = Pairwise(vae, z, target, F.mse_loss)
    for strategy in (Chop(0), Chop(1), Chop(0, block=2)):
        leaf = z.clone().requires_grad_()
        loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
        expected, _ = pairwise.expected(strategy)
        assert relative_error(torch.autograd.grad(loss, leaf)[0], expected) < 1e-10


@pytest.mark.parametrize("checkpoint", ["frame", "residual", "block"])
@pytest.mark.parametrize("name", MORE)
def test_recomputing_inside_a_group_changes_nothing(name, checkpoint):
    vae, plain = made(name)
    if not supported(Exact(pieces=True), plain):
        pytest.skip(f"the decoder of {name} is not taken apart")
    count = list(lengths(plain))[-1]
    decoder = chopgrad.decoder_for(vae, checkpoint=checkpoint)
    z = source(decoder, count).requires_grad_()
    theirs = decoder.own_decode(z)
    expected = gradients(theirs.square().mean(), z, [])
    for strategy in (Full(), Exact(pieces=checkpoint == "frame")):
        leaf = z.detach().clone().requires_grad_()
        agree(gradients(chopgrad.decode(decoder, leaf, strategy).square().mean(), leaf, []), expected)


@pytest.mark.parametrize("name", MORE)
def test_latents_are_normalised_and_back(name):
    _, decoder = made(name)
    z = source(decoder, next(lengths(decoder)))
    assert relative_error(decoder.denormalize(decoder.normalize(z)), z) < 1e-12
