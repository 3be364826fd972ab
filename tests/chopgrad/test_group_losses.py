"""The streaming form calls a loss once for each group, and everything in it gets the gradient of plain autograd."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled, frame_loss
from tests.brute_force import relative_error
from tests.models import build, latents_for

EXACT = [
    Full(),
    Exact(offload=False),
    Exact(every=2),
    Exact(offload=True, pieces=True),
    Chop(9),
    Chop(9, recompute=True),
    Chop(9, recompute=True, pieces=True),
    Sampled(99, Exact(offload=False)),
]
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def setting():
    vae = build("wan2.1")
    z = latents_for(vae, 4, size=3)
    frames = vae.decode(z).sample
    target = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return vae, chopgrad.decoder_for(vae), z, target


def refiner(z, target):
    leaf = z.clone().requires_grad_()
    net = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1)).double()
    return leaf, target, lambda x, y: F.mse_loss(x + net(x), y), [leaf, net.weight, net.bias]


def only_the_refiner(z, target):
    _, target, loss_fn, (_, weight, bias) = refiner(z, target)
    return z, target, loss_fn, [weight, bias]


def learned_weights(z, target):
    leaf = z.clone().requires_grad_()
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss_fn(x, y):
        return (-s[0]).exp() * F.mse_loss(x, y) + s[0] + (-s[1]).exp() * F.l1_loss(x, y) + s[1]

    return leaf, target, loss_fn, [leaf, s]


def target_that_requires_grad(z, target):
    leaf, y = z.clone().requires_grad_(), target.clone().requires_grad_()
    return leaf, y, F.mse_loss, [leaf, y]


def second_path_from_the_latents(z, target):
    leaf = z.clone().requires_grad_()
    gain = leaf.square().mean()
    return leaf, target, lambda x, y: F.mse_loss(x * (1 + gain), y), [leaf]


def latents_in_the_loss(z, target):
    leaf = z.clone().requires_grad_()
    return leaf, target, lambda x, y: F.mse_loss(x, y) + leaf.square().mean(), [leaf]


def another_decoded_video(z, target):
    leaf, other = z.clone().requires_grad_(), (z + 0.1).requires_grad_()
    return leaf, build("wan2.1", seed=3).decode(other).sample, F.mse_loss, [leaf, other]


def computed_beside(z, target):
    backbone = nn.Conv3d(4, 4, 1).double()
    leaf = backbone(z)  # a network that makes the latents, and something else that the loss reads
    gain = leaf[:, :, 0].mean()
    return leaf, target, lambda x, y: gain * F.mse_loss(x, y), [backbone.weight]


OUTSIDE = [second_path_from_the_latents, another_decoded_video, computed_beside]


@pytest.mark.parametrize("strategy", EXACT, ids=str)
@pytest.mark.parametrize(
    "case",
    [refiner, only_the_refiner, learned_weights, target_that_requires_grad, latents_in_the_loss, *OUTSIDE],
    ids=lambda case: case.__name__,
)
def test_every_tensor_in_the_loss_gets_its_gradient(setting, case, strategy):
    vae, decoder, z, target = setting
    torch.manual_seed(1)
    leaf, y, loss_fn, wanted = case(z, target)
    expected = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, y), wanted, retain_graph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = frame_loss(decoder, leaf, y, loss_fn, strategy)
        got = torch.autograd.grad(loss, wanted, retain_graph=True)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE
    told = [x for x in caught if "computed outside of it" in str(x.message)]
    assert len(told) == (case in OUTSIDE)


def test_a_parameter_of_the_decoder_in_the_loss(setting):
    _, _, z, target = setting
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    weight = vae.decoder.conv_out.weight

    def loss_fn(x, y):
        return F.mse_loss(x, y) + 0.1 * weight.square().sum()

    (expected,) = torch.autograd.grad(loss_fn(vae.decode(z).sample, target), weight)
    for strategy in EXACT:
        (got,) = torch.autograd.grad(frame_loss(chopgrad.decoder_for(vae), z, target, loss_fn, strategy), weight)
        assert relative_error(got, expected) < TOLERANCE, strategy


@pytest.mark.parametrize("strategy", [*EXACT, Chop(1), Chop(1, block=2)], ids=str)
def test_other_tensors_are_not_truncated(setting, strategy):
    vae, decoder, z, target = setting
    torch.manual_seed(1)
    leaf, y, loss_fn, (_, *wanted) = refiner(z, target)
    expected = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, y), wanted)
    got = torch.autograd.grad(frame_loss(decoder, leaf, y, loss_fn, strategy), wanted)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE


@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_a_loss_may_differentiate_by_itself(setting, strategy):
    """With respect to the last layer, the first layer, the latents and the frames, whatever the group."""
    _, _, z, target = setting
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    decoder = chopgrad.decoder_for(vae)
    leaf = z.clone().requires_grad_()
    wanted = [vae.decoder.conv_out.weight, vae.decoder.conv_in.weight, leaf]
    groups = decoder.frame_groups(4)
    video = vae.decode(leaf).sample
    seen = []

    def loss_fn(x, y):
        loss = F.mse_loss(x, y)
        seen.append(torch.autograd.grad(loss, wanted, retain_graph=True))
        (penalty,) = torch.autograd.grad(x.pow(3).mean(), x, create_graph=True)
        return loss + penalty.square().mean()

    loss = frame_loss(decoder, leaf, target, loss_fn, strategy)
    for group, got in zip(groups, seen, strict=True):
        one = F.mse_loss(video[:, :, group.frames], target[:, :, group.frames])
        expected = torch.autograd.grad(one, wanted, retain_graph=True)
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got, expected, strict=True))
    whole = 0.0
    for group in groups:
        x = video[:, :, group.frames]
        penalty = (3 * x.square() / x.numel()).square().mean()
        whole = whole + (F.mse_loss(x, target[:, :, group.frames]) + penalty) * group.frame_count / video.shape[2]
    expected = torch.autograd.grad(whole, wanted)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(torch.autograd.grad(loss, wanted), expected))


def test_through_the_context_a_loss_must_not_differentiate_by_itself(setting):
    _, decoder, z, target = setting
    leaf = z.clone().requires_grad_()

    def loss_fn(x, y, context):
        loss = F.mse_loss(x, y) + (0 if context is None else (x[:, :, :1] - context[0]).square().mean())
        torch.autograd.grad(loss, leaf, retain_graph=True)
        return loss

    with pytest.raises(RuntimeError, match=r"would miss what reaches a parameter.*use chopgrad\.decode"):
        frame_loss(decoder, leaf, target, loss_fn, context_frames=1)


def test_what_a_loss_differentiated_itself_is_not_differentiated_again(setting):
    _, decoder, z, target = setting
    leaf = z.clone().requires_grad_()

    def loss_fn(x, y):
        (slope,) = torch.autograd.grad(F.mse_loss(x, y), leaf, create_graph=True)
        return x.mean() + slope.square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        frame_loss(decoder, leaf, target, loss_fn)


def directional(decoder, z, target, loss_fn, strategy):
    """The gradient along a direction, and the finite difference of the value, with one seed."""
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)

    def value(t):
        torch.manual_seed(5)
        leaf = (z + t * direction).requires_grad_()
        return frame_loss(decoder, leaf, target, loss_fn, strategy), leaf

    loss, leaf = value(0.0)
    slope = (torch.autograd.grad(loss, leaf)[0] * direction).sum().item()
    difference = (value(1e-5)[0] - value(-1e-5)[0]).item() / 2e-5
    return slope, difference


def random_crop(x, y):
    i, j = torch.randint(0, 4, (2,)).tolist()
    return F.mse_loss(x[..., i : i + 3, j : j + 3], y[..., i : i + 3, j : j + 3])


def noise(x, y):
    return F.mse_loss(x, y + torch.randn_like(y))


def dropout(x, y):
    return F.mse_loss(F.dropout(x, 0.5), y)


@pytest.mark.parametrize("strategy", EXACT, ids=str)
@pytest.mark.parametrize("loss_fn", [random_crop, noise, dropout])
def test_value_and_gradient_belong_to_the_same_draw(setting, loss_fn, strategy):
    _, decoder, z, target = setting
    slope, difference = directional(decoder, z, target, loss_fn, strategy)
    assert slope == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_loss_and_target_are_called_once_for_each_group(setting, strategy):
    _, decoder, z, target = setting
    taken, calls = 0, 0

    def following(frames):  # an iterator: it cannot be asked twice
        nonlocal taken
        start, taken = taken, taken + frames.stop - frames.start
        assert start == frames.start
        return target[:, :, start:taken]

    def loss_fn(x, y):
        nonlocal calls
        calls += 1
        return F.mse_loss(x, y)

    results = []
    for form in (target, following):
        leaf = z.clone().requires_grad_()
        loss = frame_loss(decoder, leaf, form, loss_fn, strategy)
        results.append(torch.autograd.grad(loss, leaf)[0])
    assert relative_error(results[1], results[0]) < TOLERANCE
    assert calls == 2 * len(decoder.frame_groups(4))


def test_buffers_of_the_loss_change_once_for_each_group(setting):
    """A discriminator with spectral norm in training mode: value and gradient see the same weights."""
    _, decoder, z, _ = setting

    def discriminator():
        torch.manual_seed(2)
        net = nn.Sequential(parametrizations.spectral_norm(nn.Conv3d(3, 2, 1)), nn.SiLU(), nn.Conv3d(2, 1, 1))
        return net.double().train()

    results = []
    for strategy in EXACT:
        net = discriminator()
        leaf = z.clone().requires_grad_()
        loss = frame_loss(decoder, leaf, None, lambda x, _, net=net: net(x).mean(), strategy)
        results.append((torch.autograd.grad(loss, leaf)[0], *(b.clone() for b in net.buffers())))
    for result in results[1:]:
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("context_frames", [0, 1])
@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_changes_in_place_are_harmless(setting, strategy, context_frames):
    _, decoder, z, target = setting

    def pure(x, y, context=None):
        x, y = (x + 1) / 2, (y + 1) / 2
        return F.mse_loss(x, y) + (0 if context is None else (x[:, :, :1] - context[0]).square().mean())

    def in_place(x, y, context=None):
        x, y = x.add_(1).div_(2), y.add_(1).div_(2)
        return F.mse_loss(x, y) + (0 if context is None else (x[:, :, :1] - context[0]).square().mean())

    mine, results = target.clone(), []
    for loss_fn in (pure, in_place):
        leaf = z.clone().requires_grad_()
        loss = frame_loss(decoder, leaf, mine, loss_fn, strategy, context_frames=context_frames)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(mine, target)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(results[1], results[0], strict=True))


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=True, pieces=True), Chop(9)], ids=str)
def test_targets_of_any_form(setting, strategy):
    """A mask, weights, low resolution, unshuffled pixels, the slice of frames, nothing: all against the whole video."""
    vae, decoder, z, target = setting
    n = target.shape[2]
    mask = torch.rand(1, 1, *target.shape[2:], generator=torch.Generator().manual_seed(3)) > 0.5
    small = F.avg_pool3d(target, (1, 2, 2))
    shuffled = F.pixel_unshuffle(target.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, n)).transpose(1, 2)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64).view(1, 1, n)

    def folded(x):
        return F.pixel_unshuffle(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, -1)).transpose(1, 2)

    def masked(x, y):
        return ((x - y["video"]).square() * y["mask"]).mean()

    cases = [
        ({"video": target, "mask": mask}, masked),
        ((target, mask.numpy()), lambda x, y: ((x - y[0]).square() * y[1]).mean()),
        ([target, ramp], lambda x, y: ((x - y[0]).square() * y[1][..., None, None]).mean()),
        (small, lambda x, y: F.mse_loss(F.avg_pool3d(x, (1, 2, 2)), y)),
        (shuffled, lambda x, y: F.mse_loss(folded(x), y)),
        (mask, lambda x, y: (x * y).mean()),
        (None, lambda x, y: x.square().mean() if y is None else 0),
    ]
    for form, loss_fn in cases:
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, form_of(form)), leaf)
        (got,) = torch.autograd.grad(frame_loss(decoder, leaf, form, loss_fn, strategy), leaf)
        assert relative_error(got, expected) < TOLERANCE
    leaf = z.clone().requires_grad_()

    def at(frames):
        return target[:, :, frames], frames

    (expected,) = torch.autograd.grad(
        ((vae.decode(leaf).sample - target).square() * ramp[..., None, None]).mean(), leaf
    )
    weighted = frame_loss(
        decoder, leaf, at, lambda x, y: ((x - y[0]).square() * ramp[:, :, y[1]][..., None, None]).mean(), strategy
    )
    assert relative_error(torch.autograd.grad(weighted, leaf)[0], expected) < TOLERANCE


def form_of(target):
    return (target[0], torch.from_numpy(target[1])) if isinstance(target, tuple) else target


def test_a_target_of_another_precision_is_handed_over_in_that_of_the_frames():
    vae = build("wan2.1", torch.bfloat16)
    decoder = chopgrad.decoder_for(vae)
    leaf = latents_for(vae, 3).requires_grad_()
    target = torch.zeros(1, 3, 5, 4, 4)
    kinds = []

    def loss_fn(x, y):
        kinds.append((y[0].dtype, y[1].dtype))
        return F.mse_loss(x, y[0])

    frame_loss(decoder, leaf, (target, torch.ones(1, 1, 5, dtype=torch.long)), loss_fn).backward()
    assert set(kinds) == {(torch.bfloat16, torch.int64)}
    assert leaf.grad.isfinite().all()


def test_what_looks_wrong_is_told(setting):
    _, decoder, z, target = setting
    bytes_as_floats = torch.linspace(0, 255, target[:, :, :1].numel(), dtype=torch.float64).view_as(target[:, :, :1])
    with pytest.warns(UserWarning, match=r"The target goes from 0 to 255, but frames lie in \[-1, 1\]"):
        frame_loss(decoder, z, bytes_as_floats.expand_as(target), F.mse_loss)
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    count = sum(1 for _ in vae.decoder.parameters())
    with pytest.warns(UserWarning, match=rf"{count} parameters of the decoder .* get gradients beside the latents"):
        frame_loss(chopgrad.decoder_for(vae), z.clone().requires_grad_(), target, F.mse_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame_loss(chopgrad.decoder_for(vae), z.clone().requires_grad_(), target, F.mse_loss)  # said once
        frame_loss(decoder, z, 3 * target.clamp(-1, 1), F.mse_loss)  # not far outside


def test_a_loss_without_gradient_gives_a_value_without_one(setting):
    _, decoder, z, target = setting
    leaf = z.clone().requires_grad_()
    assert not frame_loss(decoder, leaf, target, lambda x, y: F.mse_loss(x.detach(), y)).requires_grad


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(offload=True, pieces=True), Chop(9)], ids=str)
def test_hooks_of_a_parameter_run_once_on_its_whole_gradient(setting, strategy):
    """Of the decoder and of a discriminator, in both forms."""
    _, _, z, target = setting
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    torch.manual_seed(1)
    net = nn.Conv3d(3, 1, 1).double()
    calls = []

    def double(gradient):
        calls.append(1)
        return 2 * gradient

    parameters = [vae.decoder.conv_out.weight, net.weight]

    def loss_fn(x, y):
        return F.mse_loss(x, y) + net(x).square().mean()

    def gradients(loss):
        return torch.autograd.grad(loss, parameters)

    decoder = chopgrad.decoder_for(vae)
    expected = gradients(loss_fn(vae.decode(z).sample, target))
    for parameter in parameters:
        parameter.register_hook(double)
    for form in (
        lambda: frame_loss(decoder, z, target, loss_fn, strategy),
        lambda: loss_fn(chopgrad.decode(decoder, z, strategy), target),
    ):
        calls.clear()
        got = gradients(form())
        assert len(calls) == 2
        assert all(relative_error(a, 2 * b) < TOLERANCE for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_frames_that_a_loss_keeps(setting, strategy):
    """Those of an earlier group would lose their gradient: an error. Detached they are constants."""
    _, decoder, z, target = setting
    leaf, kept = z.clone().requires_grad_(), []

    def loss_fn(x, y, detach):
        loss = F.mse_loss(x, y)
        if kept:
            loss = loss + (x[:, :, :1] - kept[-1][:, :, -1:]).square().mean()
        kept.append(x.detach() if detach else x)
        return loss

    with pytest.raises(ValueError, match=r"frames of an earlier group that it has kept.*use chopgrad\.decode"):
        frame_loss(decoder, leaf, target, lambda x, y: loss_fn(x, y, detach=False), strategy)
    with pytest.raises(RuntimeError, match=r"only while it runs: use chopgrad\.decode"):
        torch.autograd.grad(kept[0].mean(), leaf)
    kept.clear()
    assert frame_loss(decoder, leaf, target, lambda x, y: loss_fn(x, y, detach=True), strategy).isfinite()


@pytest.mark.parametrize("strategy", [Exact(offload=False), Chop(9)], ids=str)
def test_a_term_that_was_computed_before_of_the_same_weights(setting, strategy):
    """A relativistic discriminator: its output for real frames is used in the loss of every group."""
    vae, decoder, z, target = setting
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv3d(3, 2, 1), nn.SiLU(), nn.Conv3d(2, 1, 1)).double()
    leaf = z.clone().requires_grad_()
    wanted = [leaf, *net.parameters()]
    of_real = net(target).mean()

    def loss_fn(x, _):
        return F.softplus(2 * of_real - net(x)).mean()  # twice, so that no bias cancels

    expected = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, None), wanted, retain_graph=True)
    got = torch.autograd.grad(frame_loss(decoder, leaf, None, loss_fn, strategy), wanted)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got, expected, strict=True))


def test_forward_mode_is_refused(setting):
    _, decoder, z, target = setting
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        for call in (
            lambda: chopgrad.decode(decoder, dual),
            lambda: frame_loss(decoder, dual, target, F.mse_loss, Full()),
        ):
            with pytest.raises(TypeError, match=r"Forward-mode derivatives need chopgrad\.decode.*Full"):
                call()


def test_the_order_of_arguments_is_told(setting):
    _, decoder, z, target = setting
    with pytest.raises(TypeError, match=r"frame_loss\(decoder, latents, target, loss_fn\) got tensor"):
        frame_loss(decoder, z, F.mse_loss, target)


def test_an_error_in_a_loss_tells_what_it_was_given():
    vae = build("wan2.1")
    z = latents_for(vae, 3).requires_grad_()

    def of_the_whole_clip(frames, target):
        return frames[:, :, 3].mean()

    with pytest.raises(IndexError) as caught:
        chopgrad.frame_loss(chopgrad.decoder_for(vae), z, None, of_the_whole_clip)
    assert "loss_fn was given 1 of the frames, group 0" in caught.value.__notes__[0]
    assert "chopgrad.decode" in caught.value.__notes__[0]
