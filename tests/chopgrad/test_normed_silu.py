"""Norm and SiLU that keep their input only: the modules' own bits, and their gradients."""

import copy
import functools

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import CausalDecoder, Exact
from chopgrad.memory import PeakMemory
from chopgrad.pieces import group_norm, rms_norm
from chopgrad.pieces.group_norm import frames_per_latent
from chopgrad.pieces.plain import is_plain
from chopgrad.pieces.wan import activate
from tests.brute_force import relative_error
from tests.models import build, latents_for

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    for module in (rms_norm, group_norm):
        monkeypatch.setattr(module, "SMALLEST", 64)


def randomised(module, dtype, trained=True):
    torch.manual_seed(0)
    for p in module.to(dtype).parameters():
        nn.init.normal_(p)
    return module.requires_grad_(trained)


def wan(dtype, trained=True):
    """Ours, the modules' own, and what both depend on."""
    norm = randomised(WanRMS_norm(6, images=False, bias=True), dtype, trained)
    x = torch.randn(2, 6, 3, 9, 7, dtype=torch.float64).to(dtype).requires_grad_()
    decoder = chopgrad.decoder_for(build("wan2.1"), checkpoint=None, check=False)
    return (lambda x: activate(decoder, norm, nn.SiLU(), x)), (lambda x: F.silu(norm(x))), [x], norm


def cogvideox(dtype, trained=True, frames=5, latents=3):
    norm = randomised(CogVideoXSpatialNorm3D(8, 4, groups=2), dtype, trained)
    x = torch.randn(2, 8, frames, 12, 8, dtype=torch.float64).to(dtype).requires_grad_()
    z = torch.randn(2, 4, latents, 6, 4, dtype=torch.float64).to(dtype).requires_grad_()
    decoder = chopgrad.decoder_for(build("cogvideox"), checkpoint=None, check=False)
    return (lambda *x: decoder._activate(norm, nn.SiLU(), *x)), (lambda *x: F.silu(norm(*x)[0])), [x, z], norm


CASES = [wan, cogvideox]


@pytest.fixture
def no_fallback(monkeypatch):
    """The module's own forward is for the reference only, or for parts."""
    monkeypatch.setattr(CausalDecoder, "recomputed", lambda *args: pytest.fail("the modules were called"))


def gradients(function, inputs, module, adjoint=None, **settings):
    y = function(*inputs)
    sources = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    adjoint = torch.ones_like(y) * 0.3 + y.detach() if adjoint is None else adjoint
    return y, torch.autograd.grad(y, sources, adjoint, **settings)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bits_forward_and_gradients_backward(case, dtype, trained, no_fallback):
    ours, own, inputs, module = case(dtype, trained)
    (y, got), (expected, stock) = gradients(ours, inputs, module), gradients(own, inputs, module)
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), expected)
    if dtype != torch.bfloat16:
        assert max(map(relative_error, got, stock)) < {torch.float64: 1e-14, torch.float32: 2e-6}[dtype]
        return
    _, exact, doubles, twin = case(torch.float64, trained)
    with torch.no_grad():
        for to, source in zip([*doubles, *twin.parameters()], [*inputs, *module.parameters()], strict=True):
            to.copy_(source)
    _, true = gradients(exact, doubles, twin, (torch.ones_like(y) * 0.3 + y.detach()).double())
    for i, (a, b, c) in enumerate(zip(got, stock, true, strict=True)):
        # Of latents the gradient is rounded after it is summed over their frames and pixels, where stock's is before.
        bound = 1.6 if i in (1, 4, 5, 6, 7) and case is cogvideox else 1.05
        assert relative_error(a.double(), c) < bound * relative_error(b.double(), c)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_the_gradient_and_forward_mode(case):
    ours, own, inputs, module = case(torch.float64)
    sources = [*inputs, *module.parameters()]

    def second(function):
        _, first = gradients(function, inputs, module, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), sources)

    assert max(map(relative_error, second(ours), second(own))) < 1e-12
    tangents = tuple(torch.randn_like(x) for x in inputs)
    values = tuple(x.detach() for x in inputs)
    got, expected = (torch.func.jvp(f, values, tangents)[1] for f in (ours, own))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_only_the_input_is_kept_whole(case):
    ours, own, inputs, _ = case(torch.float64, trained=False)

    def kept(function):
        seen = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: seen.setdefault(id(x), x), lambda x: x)
        with hooks:
            function(*inputs)
        return [x for x in seen.values() if x.numel() >= inputs[0].numel()]

    assert len(kept(ours)) == 1
    assert len(kept(own)) > 2


@pytest.mark.parametrize("case", CASES)
def test_an_input_that_is_changed_raises(case):
    ours, _, inputs, _ = case(torch.float64)
    x = inputs[0].sin()
    y = ours(x, *inputs[1:])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_what_is_around_a_module_is_called(case, monkeypatch):
    ours, _, inputs, module = case(torch.float64)
    before = ours(*inputs)
    calls = []
    handle = module.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(ours(*inputs), before)
    handle.remove()
    assert calls
    monkeypatch.setattr(type(module), "forward", lambda self, *args: (2 * args[0],) if len(args) > 1 else 2 * args[0])
    assert torch.equal(ours(*inputs), F.silu(2 * inputs[0]))


@pytest.mark.parametrize("case", CASES)
def test_autocast(case):
    ours, own, inputs, _ = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(*inputs), own(*inputs)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, expected)), strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize(("frames", "latents"), [(4, 2), (5, 3), (9, 3), (8, 2), (3, 3), (1, 1), (2, 2)])
def test_frames_of_latents(frames, latents):
    ours, own, inputs, module = cogvideox(torch.float64, frames=frames, latents=latents)
    for a, b in zip(gradients(ours, inputs, module)[1], gradients(own, inputs, module)[1], strict=True):
        assert relative_error(a, b) < 1e-13


def test_frames_per_latent():
    assert frames_per_latent(9, 3, first_alone=True) == [1, 4, 4]
    assert frames_per_latent(8, 2, first_alone=False) == [4, 4]
    assert frames_per_latent(1, 1, first_alone=True) == [1]
    assert frames_per_latent(8, 3, first_alone=False) is None
    assert frames_per_latent(3, 1, first_alone=True) is None


def test_is_plain():
    norm = nn.GroupNorm(2, 4)
    assert is_plain(norm, ("GroupNorm",))
    assert not is_plain(norm, ("LayerNorm",))
    assert not is_plain(None, ("GroupNorm",))
    norm.forward = norm.forward
    assert not is_plain(norm, ("GroupNorm",))
    assert not is_plain(torch.compile(nn.GroupNorm(2, 4)), ("GroupNorm",))
    compiled = nn.GroupNorm(2, 4)
    compiled.compile()
    assert not is_plain(compiled, ("GroupNorm",))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not is_plain(nn.GroupNorm(2, 4), ("GroupNorm",))
    handle.remove()


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_walking_pieces_needs_no_checkpoint(name):
    vae = build(name)
    z = latents_for(vae, 4, size=4).requires_grad_()

    def peak(checkpoint):
        decoder = chopgrad.decoder_for(vae, checkpoint=checkpoint)
        with PeakMemory() as memory:
            chopgrad.decode(decoder, z, Exact(pieces=True)).sum().backward()
        return memory.peak_bytes

    assert peak(None) <= 1.1 * peak("frame")


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_weights_and_hooks_that_come_before_the_backward_pass(name):
    """As with PyTorch's own operators, the gradient is that of what was run."""
    vae = build(name).requires_grad_(False)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 3).requires_grad_()
    frames, stock = chopgrad.decode(decoder, z, chopgrad.Full()), vae.decode(z).sample
    for norm in [m for m in vae.decoder.modules() if isinstance(m, WanRMS_norm | nn.GroupNorm)]:
        for key, value in norm.named_parameters():
            setattr(norm, key, nn.Parameter(2 * value, requires_grad=False))
        norm.register_forward_hook(lambda module, args, y: 3 * y)
    found, expected = (torch.autograd.grad(y.square().sum(), z)[0] for y in (frames, stock))
    assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_several_adjoints_at_once(name):
    vae = build(name).requires_grad_(True)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 3).requires_grad_()
    sources = [z, *decoder.parameters()]
    frames, stock = chopgrad.decode(decoder, z, chopgrad.Full()), vae.decode(z).sample
    adjoints = torch.randn(2, *frames.shape, dtype=frames.dtype)
    settings = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
    found, expected = (torch.autograd.grad(y, sources, adjoints, **settings) for y in (frames, stock))
    norm = max(x.norm() for x in expected)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() < 1e-11 * max(y.norm(), 1e-3 * norm)


class RMS_norm(nn.Module):
    """As the original code has it."""

    def __init__(self, dim):
        super().__init__()
        self.channel_first, self.scale = True, dim**0.5
        self.gamma, self.bias = nn.Parameter(torch.rand(dim, 1, 1, 1) + 0.5), 0.0

    def forward(self, x):
        return F.normalize(x, dim=(1 if self.channel_first else -1)) * self.scale * self.gamma + self.bias


def fork(forward, **attributes):
    """A class of the same name that computes something else."""
    kind = type("RMS_norm", (RMS_norm,), {"forward": forward, "__module__": __name__})
    forward.__qualname__ = "RMS_norm.forward"
    norm = kind(8)
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


def cast_back(self, x):
    return (F.normalize(x, dim=1) * self.scale * self.gamma + self.bias).to(x.dtype)


def gain_of_its_own(self, x):
    return F.normalize(x, dim=(1 if self.channel_first else -1)) * self.scale * self.gamma * self.gain + self.bias


def another_epsilon(self, x):
    return F.normalize(x, dim=(1 if self.channel_first else -1), eps=5.0) * self.scale * self.gamma + self.bias


def test_the_known_formula_is_taken_and_no_other():
    assert rms_norm.exact_dtype(RMS_norm(8)) is torch.bfloat16 and rms_norm.takes(RMS_norm(8))
    assert rms_norm.takes(WanRMS_norm(8, images=False))
    decoder = chopgrad.decoder_for(build("wan2.1"), checkpoint=None, check=False)
    for norm in (fork(cast_back), fork(gain_of_its_own, gain=2.0), fork(another_epsilon)):
        assert not rms_norm.takes(norm)
        x = torch.randn(1, 8, 2, 4, 4).bfloat16()
        assert torch.equal(activate(decoder, norm, nn.SiLU(), x), F.silu(norm(x)))


def test_a_forward_that_is_wrapped_is_called():
    norm = fork(functools.wraps(RMS_norm.forward)(lambda self, x: 2 * x))
    assert not rms_norm.takes(norm)


@pytest.mark.parametrize("name", ["gamma", "bias"])
def test_a_tensor_that_is_no_parameter_gets_its_gradient(name):
    decoder = chopgrad.decoder_for(build("wan2.1"), checkpoint=None, check=False)
    norm, leaf = WanRMS_norm(6, images=False).double(), torch.rand(6, 1, 1, 1, dtype=torch.float64).requires_grad_()
    if name == "gamma":
        del norm.gamma
    setattr(norm, name, 2 * leaf)
    x = torch.randn(1, 6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(f(x).square().sum(), [x, leaf], retain_graph=True)
        for f in (lambda x: activate(decoder, norm, nn.SiLU(), x), lambda x: F.silu(norm(x)))
    )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize(
    ("size", "adjoint"), [(30, 100), (300, 100), (3000, 1), (1, 300), (1e-2, 100), (1e-4, 1), (300, 1e-3)]
)
def test_half_precision_has_room(size, adjoint):
    """A product of input and adjoint, or a length to the third power, leaves what float16 can hold."""
    norm = RMS_norm(32)
    x, of_y = size * torch.randn(1, 32, 2, 8, 8), adjoint * torch.randn(1, 32, 2, 8, 8)
    errors = []
    leaf = x.half().double().requires_grad_()
    twin = copy.deepcopy(norm).half().double()
    (true,) = torch.autograd.grad(F.silu(twin(leaf)), leaf, of_y.half().double())
    norm.half()
    for f in (lambda x: rms_norm.normed_silu(norm, x), lambda x: F.silu(norm(x))):
        leaf = x.half().requires_grad_()
        errors.append(relative_error(torch.autograd.grad(f(leaf), leaf, of_y.half())[0].double(), true))
    assert errors[0] < 1.2 * errors[1]


def test_nothing_is_normed_too():
    norm = WanRMS_norm(6, images=False)
    for shape in ((1, 6, 0, 4, 4), (1, 6, 2, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        assert torch.autograd.grad(rms_norm.normed_silu(norm, x).sum(), x)[0].shape == shape
