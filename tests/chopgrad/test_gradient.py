"""(b) Every strategy against brute force, (c) limits of the dial, (d) gradcheck."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.brute_force import Pairwise, relative_error
from tests.models import QWEN_SLOWLY, VAES, build, latents_for

TOLERANCE = 1e-12


def frame_difference(frames, target, context):
    """MSE plus the MSE of frame differences across the group's border."""
    loss = F.mse_loss(frames, target)
    if context is not None:
        frames, target = (torch.cat([c, x], dim=2) for c, x in zip(context, (frames, target)))
    if frames.shape[2] > 1:
        loss = loss + F.mse_loss(frames.diff(dim=2), target.diff(dim=2))
    return loss


def case(name, latent_frames, batch=1, trainable="all", clamp=True):
    vae = build(name)
    if trainable == "all":
        vae.requires_grad_(True)
    elif trainable == "some":
        vae.decoder.conv_in.requires_grad_(True)
        vae.decoder.conv_out.requires_grad_(True)
    z = latents_for(vae, latent_frames, batch)
    with torch.no_grad():
        target = torch.randn_like(chopgrad.decoder_for(vae).decode(z))
    return vae, z, target


def compare(vae, z, target, loss_fn, strategies, context_frames=0, clamp=True, checkpoint=None):
    reference = Pairwise(vae, z, target, loss_fn, context_frames, clamp)
    decoder = chopgrad.decoder_for(vae, clamp=clamp, checkpoint=checkpoint)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    for strategy in strategies:
        leaf = z.clone().requires_grad_()
        for p in trained:
            p.grad = None
        loss = chopgrad.frame_loss(decoder, leaf, target, loss_fn, strategy, context_frames=context_frames)
        loss.backward()
        latents, parameters = reference.expected(strategy)
        assert relative_error(loss.detach(), reference.loss) < TOLERANCE, strategy
        assert relative_error(leaf.grad, latents) < TOLERANCE, strategy
        norms = [x.norm().item() for x in parameters]
        for p, expected, norm in zip(trained, parameters, norms, strict=True):
            got = torch.zeros_like(p) if p.grad is None else p.grad
            scale = max(norm, 1e-3 * max(norms))
            assert (got - expected).norm().item() < TOLERANCE * scale, (strategy, expected.shape)


def dial(groups):
    """Offloading strategies move nothing on a CPU: ``test_offload`` has them where they do."""
    chops = [
        Chop(d, block=w, recompute=r)
        for d, w, r in itertools.product({0, 1, 2, groups}, {1, 2, 3, groups, groups + 1}, [False, True])
    ]
    pieces = [
        Chop(d, block=w, recompute=True, pieces=True) for d, w in itertools.product({0, 1, groups}, {1, 2, groups})
    ]
    exact = [Exact(every=k, pieces=p) for k, p in itertools.product([1, 2, 3], [False, True])]
    offloading = [Exact(offload=True, every=2), Chop(1, block=2, offload=True)]
    return [Full(), *exact, *chops, *pieces, *offloading]


IN_SHORT = [*((name, 1) for name in ("wan2.1", "cogvideox")), ("wan2.1", 5), ("wan2.2", 3), ("cogvideox", 5)]
"""Qwen-Image's VAE is Wan's in another class, and Wan 2.2 takes long."""


@pytest.mark.parametrize(
    ("name", "latent_frames"),
    [
        pytest.param(*case, marks=[] if case in IN_SHORT else pytest.mark.slow)
        for case in itertools.product(VAES, (1, 2, 3, 5))
    ],
)
def test_every_strategy_against_brute_force(name, latent_frames):
    vae, z, target = case(name, latent_frames)
    groups = len(chopgrad.decoder_for(vae).frame_groups(latent_frames))
    compare(vae, z, target, F.mse_loss, dial(groups))


@pytest.mark.parametrize("trainable", ["none", "some"])
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_batch_and_trainable_subsets(name, trainable):
    vae, z, target = case(name, 5, batch=2, trainable=trainable)
    compare(
        vae,
        z,
        target,
        F.l1_loss,
        [Full(), Exact(offload=False), Exact(every=2, pieces=True), Chop(0), Chop(1), Chop(1, block=2, recompute=True)],
    )


@pytest.mark.parametrize("context_frames", [1, 2, 5])
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_context_frames_follow_the_same_truncation(name, context_frames):
    vae, z, target = case(name, 4)
    strategies = [Full(), Exact(offload=False), Chop(0), Chop(1), Chop(1, recompute=True), Chop(1, block=2)]
    strategies += [Exact(every=2, pieces=True), Chop(1, block=2, recompute=True, pieces=True)]
    compare(vae, z, target, frame_difference, strategies, context_frames, clamp=False)


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_limits_of_the_dial_equal_full(name):
    vae, z, target = case(name, 5, trainable="none")
    decoder = chopgrad.decoder_for(vae)
    gradients = []
    limits = (
        Full(),
        Exact(offload=False),
        Chop(0, block=5),
        Chop(7),
        Chop(4, block=2),
        Chop(0, block=9, recompute=True),
    )
    for strategy in limits:
        leaf = z.clone().requires_grad_()
        chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy).backward()
        gradients.append(leaf.grad)
    plain = z.clone().requires_grad_()
    F.mse_loss(decoder.decode(plain), target).backward()
    for gradient in gradients:
        assert relative_error(gradient, plain.grad) < TOLERANCE


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_gradcheck(name):
    vae, z, target = case(name, 3, trainable="none")
    decoder = chopgrad.decoder_for(vae, clamp=False)
    z = z[..., :1, :1].clone().requires_grad_()
    target = target[..., : target.shape[-2] // 2, : target.shape[-1] // 2]
    for strategy in (Full(), Exact(offload=False)):
        assert torch.autograd.gradcheck(
            lambda x, s=strategy: chopgrad.frame_loss(decoder, x, target, F.mse_loss, s), (z,), fast_mode=True
        )
