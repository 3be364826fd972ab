"""``frame_loss`` is an ordinary scalar: it adds, accumulates, scales, runs under autocast and without gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.brute_force import relative_error
from tests.models import QWEN_SLOWLY, build, latents_for

STRATEGIES = [
    Full(),
    Exact(offload=False),
    Exact(offload=True, every=2, pieces=True),
    Chop(1),
    Chop(1, block=2, recompute=True),
    Chop(1, block=2, recompute=True, pieces=True),
]


def setting(name="wan2.1", latent_frames=4, dtype=torch.float64, batch=1):
    vae = build(name, dtype)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, latent_frames, batch)
    with torch.no_grad():
        target = torch.randn(decoder.decode(z).shape, dtype=torch.float64).to(dtype)
    return decoder, z, target


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_adds_to_other_losses_and_reaches_a_backbone(strategy):
    decoder, z, target = setting()
    backbone = nn.Conv3d(4, 4, 1, dtype=torch.float64)

    def gradient(combine):
        out = backbone(z)
        latent_loss = (out - z).square().mean()
        pixel_loss = chopgrad.frame_loss(decoder, out, target, F.mse_loss, strategy)
        return torch.autograd.grad(combine(latent_loss, pixel_loss), backbone.weight)[0]

    together = gradient(lambda a, b: 2 * a + 0.3 * b)
    apart = 2 * gradient(lambda a, b: a + 0 * b) + 0.3 * gradient(lambda a, b: b + 0 * a)
    assert relative_error(together, apart) < 1e-12


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_accumulates_over_micro_batches(strategy):
    decoder, z, target = setting(batch=2)
    decoder.vae.decoder.requires_grad_(True)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    whole = z.clone().requires_grad_()
    chopgrad.frame_loss(decoder, whole, target, F.mse_loss, strategy).backward()
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    parts = z.clone().requires_grad_()
    for i in range(2):
        (chopgrad.frame_loss(decoder, parts[i : i + 1], target[i : i + 1], F.mse_loss, strategy) / 2).backward()
    assert relative_error(parts.grad, whole.grad) < 1e-12
    assert max(relative_error(p.grad, e) for p, e in zip(parameters, expected)) < 1e-11


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_factor_before_or_behind_is_only_a_factor(strategy):
    decoder, z, target = setting()
    gradients = []
    for inside, outside in ((1.0, 1.0), (1.0, 1024.0), (1024.0, 1.0), (2.0**-30, 64.0)):
        leaf = z.clone().requires_grad_()
        loss = chopgrad.frame_loss(decoder, leaf, target, lambda x, y, f=inside: f * F.mse_loss(x, y), strategy)
        (outside * loss).backward()
        gradients.append(leaf.grad / (inside * outside))
    assert all(relative_error(g, gradients[0]) < 1e-12 for g in gradients)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_in_float16_too(strategy):
    """Inside a sweep adjoints are scaled into the range of float16: neither factor may overflow or vanish."""
    decoder, z, target = setting(dtype=torch.float16)
    reference, z32, target32 = setting(dtype=torch.float32)
    leaf = z32.requires_grad_()
    expected = chopgrad.frame_loss(reference, leaf, target32, F.mse_loss, strategy)
    (expected,) = torch.autograd.grad(expected, leaf)
    for inside, outside in ((1.0, 1.0), (1.0, 65536.0), (1e-9, 1e9), (1e9, 1e-9)):
        leaf = z.clone().requires_grad_()

        def loss_fn(frames, part, factor=inside):
            return factor * F.mse_loss(frames.float(), part.float())

        loss = outside * chopgrad.frame_loss(decoder, leaf, target, loss_fn, strategy)
        (got,) = torch.autograd.grad(loss, leaf)
        assert got.isfinite().all()
        assert 0 < relative_error(got.float() / (inside * outside), expected) < 0.02


@pytest.mark.parametrize("name", QWEN_SLOWLY)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_autocast_agrees_with_plain_back_propagation_under_autocast(name, strategy):
    decoder, z, target = setting(name, dtype=torch.float32)
    decoder.vae.decoder.requires_grad_(True)
    weight = next(p for p in decoder.parameters() if p.requires_grad)
    exact, plain, ours = (z.clone().requires_grad_() for _ in range(3))
    F.mse_loss(decoder.decode(exact), target).backward()
    weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        F.mse_loss(decoder.decode(plain).float(), target).backward()
    stock_weight_gradient, weight.grad = weight.grad, None
    full = strategy if not isinstance(strategy, Chop) else replace(strategy, distance=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chopgrad.frame_loss(decoder, ours, target, lambda x, y: F.mse_loss(x.float(), y), full)
    loss.backward()
    # The same rounding in another order: as close to plain autocast as that is to float32.
    assert relative_error(ours.grad, exact.grad) < 2 * relative_error(plain.grad, exact.grad)
    assert relative_error(weight.grad, stock_weight_gradient) < 0.05


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_without_gradients_only_the_value_is_computed(strategy):
    decoder, z, target = setting()
    with_gradient = chopgrad.frame_loss(decoder, z.clone().requires_grad_(), target, F.mse_loss, strategy)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy)
        assert not value.requires_grad
        assert value.item() == with_gradient.item()
    assert not chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).requires_grad  # nothing asks for one


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_targets_of_every_kind_give_the_same_result(name, tmp_path):
    decoder, z, target = setting(name)
    mapped = np.memmap(tmp_path / "video", dtype=np.float64, mode="w+", shape=tuple(target.shape))
    mapped[:] = target.numpy()
    results = []
    for kind in (
        target,
        target.numpy(),
        mapped,
        lambda frames: target[:, :, frames],
        lambda frames: mapped[:, :, frames],
    ):
        leaf = z.clone().requires_grad_()
        loss = chopgrad.frame_loss(decoder, leaf, kind, F.mse_loss, Chop(1))
        loss.backward()
        results.append((loss.item(), leaf.grad))
    for value, gradient in results[1:]:
        assert value == results[0][0]
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_value_is_the_loss_of_the_whole_video(strategy):
    decoder, z, target = setting("cogvideox", 5)
    with torch.no_grad():
        for loss_fn in (F.mse_loss, F.l1_loss):
            expected = loss_fn(decoder.decode(z), target)
            assert abs(chopgrad.frame_loss(decoder, z, target, loss_fn, strategy) / expected - 1) < 1e-12


def test_a_second_backward_and_a_second_derivative():
    decoder, z, target = setting()
    leaf = z.clone().requires_grad_()
    loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, Chop(1))
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    penalty = first.square().sum() + leaf.square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(penalty, leaf)  # not only in backward()


def test_training_the_decoder_lowers_the_loss():
    decoder, z, target = setting("wan2.1", 3, torch.float32)
    decoder.vae.decoder.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], lr=1e-2)
    target = 0.1 * target
    losses = []
    for _ in range(8):
        loss = chopgrad.frame_loss(decoder, z, target, F.mse_loss, Chop(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("strategy", [Exact(), Exact(pieces=True), Chop(1)], ids=str)
def test_transforms_of_torch_func_need_one_graph(strategy):
    decoder = chopgrad.decoder_for(build("cogvideox"))
    z = latents_for(decoder.vae, 2)

    def value(strategy):
        return torch.func.grad(lambda z: chopgrad.decode(decoder, z, strategy).square().sum())(z)

    with pytest.raises(TypeError, match=r"Transforms of torch.func need .* with Full"):
        value(strategy)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(chopgrad.decode(decoder, leaf, Full()).square().sum(), leaf)
    assert (value(Full()) - expected).norm() < 1e-11 * expected.norm()
