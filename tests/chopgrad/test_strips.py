"""Walking pieces in strips of rows: plain back-propagation is the reference, in float64, for every tensor."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import chopgrad
from chopgrad import Chop, Exact, Full, engine
from chopgrad.local import Local, Pooled, local
from chopgrad.planner import plan
from tests.brute_force import Pairwise
from tests.chopgrad.test_offload import BufferOnAnyDevice
from tests.models import MORE, VAES, latents_for
from tests.models import build as frozen

ROWS, WIDTH = 5, 3


def build(name):
    return frozen(name).requires_grad_(True)


def source(decoder, count=3, batch=2, rows=ROWS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((batch, decoder.latent_channels, count, rows, WIDTH), generator=generator, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["stay", "leave"])
def offload(request, monkeypatch):
    """Whether tensors wait in other memory; then they are really copied, though this is a CPU."""
    monkeypatch.setattr(engine, "OffloadBuffer", BufferOnAnyDevice)
    return request.param


def gradients(decoder, z, strategy, seed=2):
    z = z.clone().requires_grad_()
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = chopgrad.decode(decoder, z, strategy)
    adjoint = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, [z, *parameters], adjoint, allow_unused=True, materialize_grads=True)
    return y.detach(), found


def agree(found, expected, bound=1e-11):
    largest = max(x.norm() for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= bound * max(b.norm(), 1e-4 * largest)


@pytest.mark.parametrize(
    "count", [2, 9, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)  # 5 rows: strips of unequal size, and more strips than rows
@pytest.mark.parametrize("name", VAES)
def test_exact_for_every_tensor(name, count, offload):
    decoder = chopgrad.decoder_for(build(name))
    z = source(decoder)
    frames, expected = gradients(decoder, z, Full())
    seen, found = gradients(decoder, z, Exact(offload=offload, pieces=True, strips=count))
    assert (seen - frames).abs().max() <= 1e-13
    agree(found, expected)


@pytest.mark.parametrize("name", MORE)
def test_exact_for_other_classes(name):
    """Pieces that do not say how they are local are walked at once."""
    decoder = chopgrad.decoder_for(build(name))
    if not decoder.is_composed:
        pytest.skip("not taken apart")
    generator = torch.Generator().manual_seed(1)
    size = (2, decoder.latent_channels, 5, 2 * decoder.trial_size, decoder.trial_size)
    z = torch.randn(size, generator=generator, dtype=torch.float64)
    frames, expected = gradients(decoder, z, Full())
    seen, found = gradients(decoder, z, Exact(pieces=True, strips=2))
    assert (seen - frames).abs().max() <= 1e-12
    agree(found, expected, bound=1e-10)


@pytest.mark.parametrize("checkpoint", ["frame", None])
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox"])
def test_every_checkpoint(name, checkpoint):
    decoder = chopgrad.decoder_for(build(name), checkpoint=checkpoint)
    z = source(decoder)
    _, expected = gradients(decoder, z, Full())
    agree(gradients(decoder, z, Exact(pieces=True, strips=3))[1], expected)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
@pytest.mark.parametrize("strategy", [Chop(1), Chop(1, block=2), Chop(0, block=3)])
def test_truncated_in_time(name, strategy):
    vae = build(name)
    decoder = chopgrad.decoder_for(vae)
    z = source(decoder, count=5, batch=1)
    target = torch.randn_like(decoder.decode(z)).detach()
    expected = Pairwise(vae, z, target, F.mse_loss).expected(strategy)
    in_strips = Chop(strategy.distance, block=strategy.block, recompute=True, pieces=True, strips=2)
    z.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = chopgrad.frame_loss(decoder, z, target, F.mse_loss, in_strips)
    found = torch.autograd.grad(loss, [z, *decoder.parameters()])
    agree(found, [expected[0], *expected[1]])


class KeepRows(torch.autograd.Function):
    """The same tensor, whose adjoint is zero outside of some rows."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx, adjoint):
        kept = torch.zeros_like(adjoint)
        kept[..., ctx.rows, :] = adjoint[..., ctx.rows, :]
        return kept, None


def truncated_in_space(decoder, z, adjoint, strips, space):
    """By its definition: one graph for each strip of the frames, masked wherever a piece hands something on."""
    rows = z.shape[-2]
    bounds = [rows * j // strips for j in range(strips + 1)]
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    sums = [0.0] * (1 + len(parameters))
    for top, bottom in pairwise(bounds):

        def keep(x, first=top - space, last=bottom + space):
            if not isinstance(x, torch.Tensor):
                return x
            scale = x.shape[-2] // rows
            return KeepRows.apply(x, slice(max(0, first) * scale, last * scale))

        leaf, state, frames = z.clone().requires_grad_(), decoder.initial_state(), []
        for group in decoder.frame_groups(z.shape[2]):
            features, after = (keep(leaf[:, :, group.latents]),), []
            for piece, before in zip(decoder.pieces(), state, strict=True):
                features, new = piece(features, tree_map(keep, before))
                features = tuple(map(keep, features))
                after.append(new)
            state = tuple(after)
            frames.append(features[0])
        y = torch.cat(frames, dim=2)
        scale = y.shape[-2] // rows
        seed = torch.zeros_like(y)
        seed[..., top * scale : bottom * scale, :] = adjoint[..., top * scale : bottom * scale, :]
        found = torch.autograd.grad(y, [leaf, *parameters], seed, allow_unused=True, materialize_grads=True)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    return sums


@pytest.mark.parametrize(
    ("strips", "space"),
    [(2, 1), (5, 2), (3, 9), *(pytest.param(n, k, marks=pytest.mark.slow) for n, k in ((2, 0), (3, 1)))],
)
@pytest.mark.parametrize("name", VAES)
def test_truncated_in_space(name, strips, space, offload):
    decoder = chopgrad.decoder_for(build(name))
    z = source(decoder)
    frames, whole = gradients(decoder, z, Full())
    strategy = Chop(9, recompute=True, pieces=True, offload=offload, strips=strips, space=space)
    seen, found = gradients(decoder, z, strategy)
    adjoint = torch.randn(frames.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (seen - frames).abs().max() <= 1e-13
    agree(found, truncated_in_space(decoder, z, adjoint, strips, space))
    if space >= ROWS:
        agree(found, whole)
    else:
        assert (found[0] - whole[0]).norm() > 1e-3 * whole[0].norm()


def test_losses_with_context_and_gradients_inside():
    """What else sweeps back: ``context_frames``, and a loss that asks for the gradient while it runs."""
    decoder = chopgrad.decoder_for(build("wan2.1"))
    z = source(decoder)
    target = torch.zeros_like(decoder.decode(z)).detach()

    def loss_fn(frames, target, context=None):
        loss = F.mse_loss(frames, target)
        if context is not None:
            return loss + F.mse_loss(frames[:, :, :1], context[0][:, :, -1:])
        (gradient,) = torch.autograd.grad(loss, frames, create_graph=False, retain_graph=True)
        return loss * (1 + gradient.norm())

    def found(strategy):
        leaf = z.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = chopgrad.frame_loss(decoder, leaf, target, loss_fn, strategy, context_frames=1)
        return torch.autograd.grad(loss, [leaf, *decoder.parameters()])

    agree(found(Exact(pieces=True, strips=2)), found(Exact(offload=False)))


def test_some_groups_and_a_second_backward_pass():
    decoder = chopgrad.decoder_for(build("wan2.1").requires_grad_(False))
    z = source(decoder, count=4).requires_grad_()

    def found(strategy):
        y = chopgrad.decode(decoder, z, strategy, groups=slice(1, 3))
        once = torch.autograd.grad(y.square().sum(), z, retain_graph=True)[0]
        return once, torch.autograd.grad(y.sum(), z)[0]

    agree(found(Exact(pieces=True, strips=3, every=2)), found(Full()))


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_low_precision_is_no_worse_than_stock(name):
    exact = build(name)
    reference = gradients(chopgrad.decoder_for(exact), source(chopgrad.decoder_for(exact)), Full())[1]
    low = chopgrad.decoder_for(copy.deepcopy(exact).to(torch.bfloat16))
    z = source(low).to(torch.bfloat16)

    def error(strategy):
        found = gradients(low, z, strategy)[1]
        return max((a.double() - b).norm() / b.norm().clamp(min=1e-3) for a, b in zip(found, reference, strict=True))

    assert error(Exact(pieces=True, strips=3)) <= 1.5 * error(Full())


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_autocast(name):
    decoder = chopgrad.decoder_for(build(name).float())
    z = source(decoder, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        frames, expected = gradients(decoder, z, Full())
        seen, found = gradients(decoder, z, Exact(pieces=True, strips=3))
    assert seen.dtype == frames.dtype
    assert (seen - frames).float().norm() <= 0.02 * frames.float().norm()
    assert (found[0] - expected[0]).norm() <= 0.05 * expected[0].norm()


@pytest.mark.parametrize("name", VAES)
def test_frames_in_float32(name):
    """Equal to the last bit where the convolution does the same sums; the bound where it does not."""
    decoder = chopgrad.decoder_for(build(name).float())
    z = source(decoder, dtype=torch.float32)
    frames, seen = (gradients(decoder, z, s)[0] for s in (Full(), Exact(pieces=True, strips=3)))
    assert (seen - frames).abs().max() <= 1e-5 * frames.abs().max()


def test_a_hook_that_mixes_rows_sees_the_whole():
    vae = build("wan2.1")
    convolution = vae.decoder.up_blocks[0].resnets[0].conv1
    handle = convolution.register_forward_hook(lambda module, inputs, output: output - output.mean((-1, -2), True))
    decoder = chopgrad.decoder_for(vae)
    z = source(decoder)
    _, expected = gradients(decoder, z, Full())
    agree(gradients(decoder, z, Exact(pieces=True, strips=3))[1], expected)
    handle.remove()


def mean_of_rows(y):
    return y - y.mean((-1, -2), keepdim=True)


class Squeezed(nn.Module):
    """An adapter around a convolution that looks at all rows."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, *args, **kwargs):
        y = self.convolution(*args, **kwargs)
        return y * y.mean((-1, -2), keepdim=True).sigmoid()


def circular(vae, monkeypatch):
    """What makes decoders of tiles that can be laid side by side."""
    for module in vae.decoder.modules():
        if type(module) is nn.Conv2d and module.kernel_size[0] > 1:
            module.padding_mode = "circular"


def hooked_shortcut(vae, monkeypatch):
    for module in vae.decoder.modules():
        if getattr(module, "avg_shortcut", None) is not None:
            module.avg_shortcut.register_forward_hook(lambda module, args, y: mean_of_rows(y))


def around_a_layer(vae, monkeypatch):
    block = vae.decoder.up_blocks[0].resnets[0]
    block.conv1 = Squeezed(block.conv1)


def forward_of_an_instance(vae, monkeypatch):
    convolution = vae.decoder.up_blocks[0].resnets[0].conv1
    own = convolution.forward
    convolution.forward = lambda *args, **kwargs: mean_of_rows(own(*args, **kwargs))


def forward_of_a_class(vae, monkeypatch):
    cls = type(vae.decoder.up_blocks[0].resnets[0].conv1)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: mean_of_rows(own(self, *args, **kwargs)))


def backward_hook(vae, monkeypatch):
    block = vae.decoder.up_blocks[0].resnets[0]
    block.nonlinearity = nn.SiLU()
    block.nonlinearity.register_full_backward_hook(lambda module, found, given: (mean_of_rows(found[0]),))


def norm_of_another_class(vae, monkeypatch):
    norm = vae.decoder.up_blocks[0].resnets[0].norm1

    class Doubled(type(norm)):
        def forward(self, *args, **kwargs):
            y, kept = super().forward(*args, **kwargs)
            return 2 * y + 0.1, kept

    norm.__class__ = Doubled


def forward_of_a_group_norm(vae, monkeypatch):
    norm = vae.decoder.up_blocks[0].resnets[0].norm1.norm_layer
    own = norm.forward
    norm.forward = lambda x: 2 * own(x) + 0.1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wan2.1", circular), ("cogvideox", circular), ("wan2.2", hooked_shortcut), ("wan2.1", around_a_layer),
        ("wan2.1", forward_of_an_instance), ("wan2.1", forward_of_a_class), ("wan2.1", backward_hook),
        ("cogvideox", backward_hook), ("cogvideox", norm_of_another_class), ("cogvideox", forward_of_a_group_norm),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_local_sees_the_whole(name, change, monkeypatch):
    vae = build(name)
    change(vae, monkeypatch)
    decoder = chopgrad.decoder_for(vae, check=False)
    z = source(decoder)
    agree_whole(decoder, z)


def agree_whole(decoder, z):
    (frames, found), (own, expected) = (gradients(decoder, z, s) for s in (Exact(pieces=True, strips=3), Full()))
    assert (frames - own).norm() < 1e-11 * own.norm()
    agree(found, expected)


def test_a_hook_on_all_modules_sees_the_whole():
    decoder = chopgrad.decoder_for(build("wan2.1"))
    z = source(decoder)
    convolutions = nn.Conv2d | nn.Conv3d
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: mean_of_rows(y) if isinstance(module, convolutions) else None
    )
    try:
        agree_whole(decoder, z)
    finally:
        handle.remove()


def test_a_hook_that_comes_before_the_backward_pass():
    """Walked at once then, from what was cut in the forward pass."""
    decoder = chopgrad.decoder_for(build("wan2.1"))
    z = source(decoder).requires_grad_()
    expected = torch.autograd.grad(chopgrad.decode(decoder, z, Full()).square().sum(), z)[0]
    frames = chopgrad.decode(decoder, z, Exact(pieces=True, strips=3))
    for module in decoder.vae.decoder.modules():
        if "RMS_norm" in type(module).__name__:
            module.register_forward_hook(lambda module, args, y: None)
    (found,) = torch.autograd.grad(frames.square().sum(), z)
    assert (found - expected).norm() < 1e-11 * expected.norm()


def test_a_layer_of_another_kind_sees_the_whole():
    vae = build("wan2.1")
    vae.decoder.up_blocks[0].resnets[0].norm1 = nn.GroupNorm(2, vae.decoder.up_blocks[0].resnets[0].conv1.in_channels)
    vae.double()
    decoder = chopgrad.decoder_for(vae)
    z = source(decoder)
    _, expected = gradients(decoder, z, Full())
    agree(gradients(decoder, z, Exact(pieces=True, strips=3))[1], expected)


def test_larger_kernels_reach_further():
    wide = nn.Conv3d(2, 2, (3, 7, 7), padding=(0, 3, 3))
    run = lambda features, state: (features, state)  # noqa: E731
    assert local(run, wide, nn.SiLU(), nn.Conv2d(2, 2, 3, padding=1)).radius == 4
    assert local(run, nn.Conv2d(2, 2, 3, stride=2)) is run
    assert local(run, nn.AdaptiveAvgPool2d(1)) is run


@pytest.mark.parametrize(("name", "nonlocal_pieces"), [("wan2.1", 1), ("wan2.2", 1), ("qwen", 1), ("cogvideox", 0)])
def test_which_pieces_are_local(name, nonlocal_pieces):
    """All but the attention in the middle of Wan's; otherwise strips would save nothing."""
    pieces = chopgrad.decoder_for(build(name)).pieces()
    assert sum(not isinstance(p, Local) for p in pieces) == nonlocal_pieces
    assert any(isinstance(p, Pooled) for p in pieces) == (name == "cogvideox")


def test_adapters_stay_local():
    peft = pytest.importorskip("peft")
    vae = build("wan2.1").float()
    names = [n for n, m in vae.decoder.named_modules() if type(m) is nn.Conv2d and "up_blocks" in n]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), vae.decoder)
    vae.double()
    decoder = chopgrad.decoder_for(vae)
    assert sum(not isinstance(p, Local) for p in decoder.pieces()) == 1
    z = source(decoder)
    _, expected = gradients(decoder, z, Full())
    agree(gradients(decoder, z, Exact(pieces=True, strips=3))[1], expected)


def test_encoder():
    encoder = chopgrad.encoder_for(build("wan2.1"))
    video = torch.randn(1, 3, 9, 5 * encoder.spatial_factor, 2 * encoder.spatial_factor, dtype=torch.float64)
    video.requires_grad_()

    def found(strategy):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = chopgrad.encode(encoder, video, strategy)
        return torch.autograd.grad(y.square().sum(), [video, *encoder.parameters()])

    agree(found(Exact(pieces=True, strips=3)), found(Full()))


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_memory_falls(name):
    """What is handed from piece to piece stays whole, so that the peak does not fall to an eighth."""
    whole, in_strips = (
        plan(name, 9, 480, 832, strategies=[Exact(offload=True, pieces=True, strips=n)], checkpoint="frame")[0]
        for n in (None, 8)
    )
    assert in_strips.device_bytes < 0.6 * whole.device_bytes
    assert in_strips.host_bytes < 1.1 * whole.host_bytes


class Counted(TorchDispatchMode):
    """How many operators run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_strips_run_no_more_operators_than_there_are_strips(name):
    """A GPU waits for each: eight times as many small ones would take eight times as long."""
    decoder = chopgrad.decoder_for(frozen(name, torch.float32))
    z = latents_for(decoder.vae, 4, size=8).requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    counts = []
    for strips in (None, 8):
        with Counted() as counted:
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(pieces=True, every=1, strips=strips)).backward()
        counts.append(counted.count)
    assert counts[1] < 8 * counts[0]


@pytest.mark.parametrize("strips", [0, -1, True, 2.0])
def test_bad_counts(strips):
    with pytest.raises((TypeError, ValueError), match="strips must be"):
        Exact(pieces=True, strips=strips)


def test_strips_need_pieces():
    with pytest.raises(ValueError, match="strips walk each piece"):
        Exact(strips=2)
    with pytest.raises(ValueError, match="strips walk each piece"):
        Chop(1, recompute=True, strips=2)


def test_a_distance_in_space_needs_strips():
    with pytest.raises(ValueError, match="space is the distance from a strip"):
        Chop(1, recompute=True, pieces=True, space=1)
    with pytest.raises(ValueError, match="space must be at least 0"):
        Chop(1, recompute=True, pieces=True, strips=2, space=-1)
