"""``decode`` is an ordinary node of autograd: what it costs, when it frees, what it composes with, what it refuses.

That its gradients are right for any loss is in test_any_loss.
"""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from chopgrad.memory import PeakMemory
from tests.brute_force import PairwiseAdjoint, relative_error
from tests.models import VAES, build, latents_for
from tests.processes import on_workers

EXACT = [
    Full(),
    Exact(offload=False),
    Exact(every=2),
    Exact(offload=True, pieces=True),
    Chop(9),
    Chop(4, block=2, recompute=True),
]
TRUNCATED = [Chop(0), Chop(1), Chop(1, block=2), Chop(2, block=3, recompute=True, pieces=True)]
NODES = [Exact(offload=False), Exact(offload=True, pieces=True), Chop(1), Chop(1, block=2, recompute=True)]
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _quiet_about_trainable_decoders():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*parameters of the decoder")
        yield


def case(name="wan2.1", latent_frames=5, trainable=False, batch=1, dtype=torch.float64):
    vae = build(name, dtype)
    vae.decoder.requires_grad_(trainable)
    return vae, chopgrad.decoder_for(vae), latents_for(vae, latent_frames, batch).requires_grad_()


def clip_loss(frames):
    """Every frame with every other."""
    x = frames.transpose(1, 2).flatten(2)
    return (x @ x.transpose(1, 2)).square().mean() + x.sum().sin()


def gradients(frames_or_loss, tensors, loss=clip_loss, **settings):
    value = frames_or_loss if frames_or_loss.ndim == 0 else loss(frames_or_loss)
    return torch.autograd.grad(value, tensors, allow_unused=True, **settings)


def assert_same(got, expected, tolerance=TOLERANCE):
    largest = max(x.norm().item() for x in expected if x is not None)
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).norm().item() <= tolerance * max(y.norm().item(), 1e-3 * largest)


class Steps:
    """Counts a decoder's steps by group: (without graph, with graph)."""

    def __init__(self, decoder):
        self.step, decoder.step = decoder.step, self
        self.counts = [0, 0]

    def __call__(self, z, state):
        self.counts[torch.is_grad_enabled()] += 1
        return self.step(z, state)

    def taken(self):
        counts, self.counts = tuple(self.counts), [0, 0]
        return counts


# Cost


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize(
    ("strategy", "backward"),
    [
        (Exact(offload=False), lambda t: (0, t)),
        (Exact(every=3), lambda t: (t - -(-t // 3), t)),  # what is not kept is rebuilt
        (Chop(0), lambda t: (0, t)),  # streams again, with graphs
        (Chop(2), lambda t: (0, t)),
        (Chop(1, block=9, recompute=True), lambda t: (t - 1, t)),  # the last group is swept at once
    ],
    ids=lambda x: "" if callable(x) else str(x),  # the address of a function differs between processes
)
def test_forward_runs_once_without_graphs_and_backward_what_the_strategy_says(name, strategy, backward):
    _, decoder, z = case(name, 6)
    count, steps = len(decoder.frame_groups(6)), Steps(decoder)
    frames = chopgrad.decode(decoder, z, strategy)
    assert steps.taken() == (count, 0)
    clip_loss(frames).backward()
    assert steps.taken() == backward(count)


def test_full_is_one_graph():
    _, decoder, z = case()
    steps = Steps(decoder)
    clip_loss(chopgrad.decode(decoder, z, Full())).backward()
    assert steps.taken() == (0, 5)


def waiting_bytes(latent_frames, strategy, after=False):
    """What is alive between forward and backward pass, or after both, beside the frames and the latents' gradient."""
    _, decoder, z = case(latent_frames=latent_frames)
    with PeakMemory() as memory:
        frames = chopgrad.decode(decoder, z, strategy)
        if after:
            frames.backward(torch.ones_like(frames))
        return memory.live_bytes("cpu") - frames.nbytes - (z.grad.nbytes if after else 0)


@pytest.mark.parametrize("strategy", [Chop(1), Chop(2, block=3), Chop(1, recompute=True)], ids=str)
def test_a_chop_waits_with_no_state_but_the_first(strategy):
    assert waiting_bytes(12, strategy) == waiting_bytes(6, strategy) == 0
    assert waiting_bytes(12, Exact(offload=False)) > 1.5 * waiting_bytes(6, Exact(offload=False)) > 0


@pytest.mark.parametrize("strategy", [Full(), *NODES, Exact(every=2)], ids=str)
def test_what_waits_is_freed_by_the_backward_pass_though_the_frames_live(strategy):
    gc.disable()
    try:
        assert waiting_bytes(6, strategy, after=True) <= 8  # the sum's own seed
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", [Full(), *NODES], ids=str)
def test_what_waits_is_freed_with_the_frames(strategy):
    _, decoder, z = case()
    gc.disable()
    try:
        with PeakMemory() as memory:
            frames = chopgrad.decode(decoder, z, strategy)
            del frames
            assert memory.live_bytes("cpu") == 0
    finally:
        gc.enable()


def test_peak_of_a_chop_does_not_depend_on_the_number_of_frames():
    def peak(latent_frames):
        _, decoder, z = case(latent_frames=latent_frames)
        with PeakMemory() as memory:
            frames = chopgrad.decode(decoder, z, Chop(1))
            frames.backward(torch.ones((), dtype=z.dtype).expand_as(frames))
        return memory.peak_bytes - frames.nbytes - z.nbytes

    assert peak(18) <= 1.02 * peak(12)


# A part of the frames


@pytest.mark.parametrize("strategy", [*EXACT, *TRUNCATED], ids=str)
@pytest.mark.parametrize(
    ("name", "latent_frames", "history"),
    [
        ("wan2.1", 6, True), ("wan2.2", 5, False), ("cogvideox", 11, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("wan2.1", 6, False), ("wan2.2", 5, True), ("cogvideox", 11, False))
        ),
    ],
)  # fmt: skip
def test_some_groups_against_brute_force(name, latent_frames, strategy, history):
    vae, decoder, z = case(name, latent_frames, trainable=True)
    spans = decoder.frame_groups(latent_frames)
    whole = decoder.decode(z).detach()
    tensors = [z, *decoder.parameters()]
    tensors = [x for x in tensors if x.requires_grad]
    for groups in (slice(2, 4), slice(-2, None), slice(None, 1)):
        frames = chopgrad.decode(decoder, z, strategy, groups=groups, history=history)
        chosen = spans[groups]
        assert torch.equal(frames, whole[:, :, chosen[0].frames.start : chosen[-1].frames.stop])
        reference = PairwiseAdjoint.of(vae, z, strategy, groups=groups, history=history)
        found = gradients(frames, tensors)
        assert_same(found, gradients(reference, tensors))
        first = chosen[0].latents.start
        if not history and first:
            assert not found[0][:, :, :first].any()
        assert not found[0][:, :, chosen[-1].latents.stop :].any()


@pytest.mark.parametrize(
    ("strategy", "history", "backward"),
    [
        (Exact(offload=False), True, (0, 5)),
        (Exact(offload=False), False, (0, 2)),
        (Chop(1), True, (0, 3)),
        (Chop(1), False, (0, 2)),
        (Chop(0, block=2), True, (0, 2)),
        (Chop(1, block=2, recompute=True), False, (1, 2)),
    ],
    ids=str,
)
def test_no_step_runs_more_often_than_the_part_needs(strategy, history, backward):
    _, decoder, z = case(latent_frames=9)
    steps = Steps(decoder)
    frames = chopgrad.decode(decoder, z, strategy, groups=slice(3, 5), history=history)
    assert steps.taken() == (5, 0)
    clip_loss(frames).backward()
    assert steps.taken() == backward


def test_full_without_history_builds_no_graph_before():
    _, decoder, z = case(latent_frames=6)
    steps = Steps(decoder)
    chopgrad.decode(decoder, z, Full(), groups=slice(3, 5), history=False)
    assert steps.taken() == (3, 2)


def test_the_parts_add_up_to_the_whole():
    _, decoder, z = case(trainable=True)
    tensors = [z, decoder.vae.decoder.conv_in.weight]
    whole = gradients(chopgrad.decode(decoder, z, Exact(offload=False)).square().sum(), tensors)
    parts = [chopgrad.decode(decoder, z, Exact(offload=False), groups=slice(i, i + 1)).square().sum() for i in range(5)]
    assert_same(gradients(sum(parts), tensors), whole)


@pytest.mark.parametrize(
    ("groups", "error", "sentence"),
    [
        (slice(None, None, 2), TypeError, r"groups must be a slice .* without a step.*got slice\(None, None, 2\)"),
        (slice(None, None, -1), TypeError, "without a step"),
        (3, TypeError, "groups must be a slice of groups.*got 3"),
        (range(2), TypeError, r"such as slice\(2, 4\)"),
        (slice(3, 3), ValueError, r"groups=slice\(3, 3, None\) has none of the 5 groups"),
        (slice(5, None), ValueError, "has none of the 5 groups"),
    ],
)
def test_slices_that_are_refused(groups, error, sentence):
    _, decoder, z = case()
    with pytest.raises(error, match=sentence):
        chopgrad.decode(decoder, z, groups=groups)


# An ordinary node


@pytest.mark.parametrize("strategy", [Full(), *NODES], ids=str)
def test_backward_twice_with_retain_graph_and_not_without(strategy):
    _, decoder, z = case(trainable=True)
    tensors = [z, decoder.vae.decoder.conv_in.weight]
    loss = clip_loss(chopgrad.decode(decoder, z, strategy))
    first, second, third = (gradients(loss, tensors, retain_graph=kept) for kept in (True, True, False))
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(loss, tensors)


def test_second_derivatives_of_full_only():
    vae, decoder, z = case(latent_frames=2)

    def by_backward(x):
        z.grad = None
        x.backward()
        return [z.grad]

    def by_grad(x):  # passes by what raises in backward() alone
        return torch.autograd.grad(x, [z])

    @sdpa_kernel(SDPBackend.MATH)  # the other has no second derivative
    def second(decode, how):
        (slope,) = torch.autograd.grad(clip_loss(decode(z)), z, create_graph=True)
        return how(slope.square().sum() + z.square().sum())

    for how in (by_backward, by_grad):
        expected = second(lambda z: vae.decode(z).sample, how)
        assert_same(second(lambda z: chopgrad.decode(decoder, z, Full()), how), expected)
        for strategy in NODES:
            with pytest.raises(RuntimeError, match=r"cannot be differentiated again: use chopgrad\.decode.*Full"):
                second(lambda z, s=strategy: chopgrad.decode(decoder, z, s), how)


def nudge(x):
    with torch.no_grad():
        x.add_(0.1)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(
    ("what", "strategy"),
    [("weight", Full()), *((what, strategy) for what in ("weight", "latents") for strategy in NODES)],
    ids=str,
)
def test_a_change_in_place_before_the_backward_pass_is_torchs_error(strategy, trainable, what):
    _, decoder, z = case(trainable=trainable)
    z = z * 1.0
    frames = chopgrad.decode(decoder, z, strategy)
    nudge(z if what == "latents" else decoder.vae.decoder.mid_block.resnets[0].conv1.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        clip_loss(frames).backward()


@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_hooks_on_the_frames(strategy):
    _, decoder, z = case()
    seen = []
    frames = chopgrad.decode(decoder, z, strategy)
    (plain,) = gradients(frames, [z], retain_graph=True)
    frames.retain_grad()
    frames.register_hook(lambda g: seen.append(g.shape) or 3 * g)
    (tripled,) = gradients(frames, [z])
    assert seen == [frames.shape]
    assert relative_error(tripled, 3 * plain) < TOLERANCE


@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_two_videos_compared_and_several_losses_on_one(strategy):
    vae, decoder, z = case(trainable=True)
    other = latents_for(vae, 5, seed=7).requires_grad_()
    tensors = [z, other, *(p for p in decoder.parameters() if p.requires_grad)]

    def differentiate(decode):
        for x in tensors:
            x.grad = None
        a, b = decode(z), decode(other)
        (a - b).square().mean().backward(retain_graph=True)
        (a * b).mean().backward(retain_graph=True)  # accumulates
        a[:, :, -1].abs().mean().backward()
        return [x.grad for x in tensors]

    expected = differentiate(lambda x: vae.decode(x).sample)
    assert_same(differentiate(lambda x: chopgrad.decode(decoder, x, strategy)), expected)


@pytest.mark.parametrize("strategy", [*EXACT, *TRUNCATED], ids=str)
def test_micro_batches_accumulate(strategy):
    _, decoder, z = case(trainable=True, batch=2)
    tensors = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    target = torch.randn(decoder.decode(z).shape, dtype=z.dtype)
    whole = gradients(F.mse_loss(chopgrad.decode(decoder, z, strategy), target), tensors)
    for i in range(2):
        frames = chopgrad.decode(decoder, z[i : i + 1], strategy)
        (F.mse_loss(frames, target[i : i + 1]) / 2).backward()
    assert_same([x.grad for x in tensors], whole, 1e-11)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_autocast_agrees_with_plain_back_propagation_under_autocast(name, strategy):
    vae, decoder, z = case(name, 4, trainable=True, dtype=torch.float32)
    tensors = [z, next(p for p in decoder.parameters() if p.requires_grad)]

    def loss(frames):
        return frames.float().square().mean() + (frames[:, :, 0] * frames[:, :, -1]).float().mean()

    exact = gradients(vae.decode(z).sample, tensors, loss)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = vae.decode(z).sample, chopgrad.decode(decoder, z, strategy)
    assert ours.dtype == stock.dtype
    stock, ours = gradients(stock, tensors, loss), gradients(ours, tensors, loss)  # outside of it, as one should
    assert relative_error(ours[0], exact[0]) < 2 * relative_error(stock[0], exact[0])
    assert relative_error(ours[1], stock[1]) < 0.05


@pytest.mark.parametrize("strategy", [*EXACT, *TRUNCATED], ids=str)
def test_without_gradients_only_frames_are_computed(strategy):
    vae, decoder, z = case(trainable=True)
    expected = chopgrad.decode(decoder, z, strategy)
    assert expected.requires_grad
    steps = Steps(decoder)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            frames = chopgrad.decode(decoder, z, strategy)
            assert not frames.requires_grad
            assert torch.equal(frames, expected)
    assert steps.counts[True] == 0
    vae.requires_grad_(False)
    assert not chopgrad.decode(decoder, z.detach(), strategy).requires_grad  # nothing asks for one


@pytest.mark.parametrize("strategy", [Full(), *NODES], ids=str)
def test_under_torchs_own_checkpointing(strategy):
    _, decoder, z = case(trainable=True)
    tensors = [z, decoder.vae.decoder.conv_in.weight]
    steps = Steps(decoder)
    expected = gradients(chopgrad.decode(decoder, z.sin(), strategy), tensors)
    once = steps.taken()
    loss = checkpoint(lambda x: clip_loss(chopgrad.decode(decoder, x.sin(), strategy)), z, use_reentrant=False)
    assert_same(gradients(loss, tensors), expected)
    assert strategy.plan().pieces or sum(steps.taken()) == sum(once) + 5  # the forward pass once more


FORMS = {
    "decode": lambda decoder, z, strategy: chopgrad.decode(decoder, z, strategy).square().mean(),
    "frame_loss": lambda decoder, z, strategy: chopgrad.frame_loss(
        decoder, z, None, lambda frames, _: frames.square().mean(), strategy
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_parametrized_weights_lose_no_gradient(strategy, form):
    vae, _, z = case(latent_frames=3)
    vae.decoder.conv_out.requires_grad_(True)
    parametrizations.weight_norm(vae.decoder.conv_out)
    decoder = chopgrad.decoder_for(vae)
    tensors = [z, *(p for p in vae.parameters() if p.requires_grad)]
    assert len(tensors) == 4  # magnitude, direction and bias
    expected = gradients(vae.decode(z).sample.square().mean(), tensors)
    assert all(x is not None for x in expected)
    assert_same(gradients(FORMS[form](decoder, z, strategy), tensors), expected)
    with parametrize.cached():
        assert_same(gradients(FORMS[form](decoder, z, strategy), tensors), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", [*EXACT, *TRUNCATED], ids=str)
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "qwen"])
def test_what_one_latent_does_not_use_has_no_gradient(name, strategy, form):
    """A zero would let weight decay move the upsampler in time, which the first latent passes by."""
    vae, decoder, z = case(name, 1, trainable=True)
    tensors = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    expected = gradients(vae.decode(z).sample.square().mean(), tensors)
    assert any(x is None for x in expected)
    assert_same(gradients(FORMS[form](decoder, z, strategy), tensors), expected)


class Deciding(nn.Module):
    """A trainable decoder and what comes before it in one module, as DDP wants it."""

    def __init__(self, strategy):
        super().__init__()
        self.vae = build("wan2.1")
        self.vae.decoder.requires_grad_(True)
        torch.manual_seed(0)
        self.backbone = nn.Conv3d(4, 4, 1, dtype=torch.float64)
        self.decoder, self.strategy = chopgrad.decoder_for(self.vae), strategy

    def forward(self, z):
        return chopgrad.decode(self.decoder, self.backbone(z), self.strategy)


def worker(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for strategy in (Exact(offload=True, pieces=True), Chop(1)):
        models = [Deciding(strategy) for _ in range(3)]
        names = [n for n, p in models[0].named_parameters() if p.requires_grad]
        alone = []
        for other in range(2):
            model = models[other]
            clip_loss(model(latents_for(model.vae, 3, seed=other))).backward()
            alone.append([model.get_parameter(n).grad for n in names])
        model = nn.parallel.DistributedDataParallel(models[2])
        clip_loss(model(latents_for(models[2].vae, 3, seed=rank))).backward()
        for name, a, b in zip(names, *alone, strict=True):
            torch.testing.assert_close(models[2].get_parameter(name).grad, (a + b) / 2)
        assert not torch.allclose(alone[0][0], alone[1][0])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_inside_distributed_data_parallel(tmp_path):
    on_workers(worker, str(tmp_path / "store"))


# float16

IN_HALF = [Exact(offload=False), Exact(offload=True, pieces=True), Chop(4, block=2, recompute=True)]


def half_gradient(name, dtype, differentiate):
    vae = build(name, dtype)
    z = latents_for(build(name, torch.float32), 3).to(dtype).requires_grad_()
    return torch.autograd.grad(differentiate(vae, chopgrad.decoder_for(vae), z), z)[0].float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", IN_HALF, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_float16_with_a_grad_scalers_factor(name, strategy, form):
    """65536 is where a GradScaler begins; without scaling inside, it overflows."""

    def plain(scale):
        return lambda vae, decoder, z: scale * vae.decode(z).sample.float().square().mean()

    def ours(vae, decoder, z):
        if form == "decode":
            return 65536 * chopgrad.decode(decoder, z, strategy).float().square().mean()
        return 65536 * chopgrad.frame_loss(decoder, z, None, lambda x, _: x.float().square().mean(), strategy)

    exact = half_gradient(name, torch.float32, plain(1.0))
    stock = half_gradient(name, torch.float16, plain(16.0)) / 16
    got = half_gradient(name, torch.float16, ours) / 65536
    assert got.isfinite().all()
    assert 0 < relative_error(got, exact) < 2 * relative_error(stock, exact)


@pytest.mark.parametrize("size", [2.0**-20, 2.0**14])
@pytest.mark.parametrize("strategy", IN_HALF, ids=str)
def test_tiny_and_huge_adjoints_in_float16(strategy, size):
    """The first is below float16's normal range, the second overflows at the first sum of two times two of them."""
    vae, decoder, z = case(latent_frames=3, trainable=True, dtype=torch.float32)
    tensors = [z, vae.decoder.conv_in.weight, vae.decoder.conv_out.bias]
    signs = torch.randn(decoder.decode(z).shape, generator=torch.Generator().manual_seed(0)).sign()
    exact = torch.autograd.grad(decoder.decode(z), tensors, signs)
    with torch.autocast("cpu", torch.float16):
        frames, stock = chopgrad.decode(decoder, z, strategy), decoder.decode(z)
    assert frames.dtype == torch.float16
    got = torch.autograd.grad(frames, tensors, (size * signs).half())
    for x, y, plain in zip(got, exact, torch.autograd.grad(stock, tensors, signs.half()), strict=True):
        assert relative_error(x / size, y) < max(2 * relative_error(plain, y), 1e-3)


@pytest.mark.parametrize("size", [1e-9, 1e9])
@pytest.mark.parametrize("strategy", IN_HALF, ids=str)
def test_tiny_and_huge_losses_in_float16(strategy, size):
    def ours(size):
        def differentiate(vae, decoder, z):
            loss = chopgrad.frame_loss(decoder, z, None, lambda x, _: size * x.float().square().mean(), strategy)
            return loss / size

        return differentiate

    exact = half_gradient("cogvideox", torch.float32, ours(1.0))
    got, plain = (half_gradient("cogvideox", torch.float16, ours(s)) for s in (size, 1.0))
    assert 0 < relative_error(got, exact) < 2 * relative_error(plain, exact)


# What is refused


def test_what_has_no_meaning_is_refused():
    vae, decoder, z = case()
    with pytest.raises(TypeError, match=r"Sampled\(2\) draws.*decode hands out frames: pass Chop.*groups=slice"):
        chopgrad.decode(decoder, z, Sampled(2))
    with pytest.raises(ValueError, match=r"got \[1, 4, 2, 2\].*pass latents.unsqueeze\(2\)"):
        chopgrad.decode(decoder, z[:, :, 0])
    with pytest.raises(TypeError, match=r"decoder must come from chopgrad.decoder_for\(vae\), got AutoencoderKLWan"):
        chopgrad.decode(vae, z)
    with pytest.raises(TypeError, match="strategy must be"):
        chopgrad.decode(decoder, z, Exact)
    with pytest.raises(TypeError, match=r"latents are torch.float32, but the decoder is torch.float64"):
        chopgrad.decode(decoder, z.float())


def test_the_default_is_exact_and_less_may_be_asked_for(stock_graphs):
    vae, decoder, z = case(latent_frames=6)
    assert_same(gradients(chopgrad.decode(decoder, z), [z]), gradients(vae.decode(z).sample, [z]))

    def peak(*strategy):
        with PeakMemory() as memory:
            clip_loss(chopgrad.decode(decoder, z, *strategy)).backward()
        return memory.peak_bytes

    assert peak() == peak(Exact())
    assert peak(Exact(within=1)) < 0.6 * peak(Exact(offload=False)) < 0.6 * peak(Full())


def replaced_module(vae):
    vae.decoder.conv_out = copy.deepcopy(vae.decoder.conv_out)


def replaced_weights(vae):
    vae.load_state_dict({k: v.clone() for k, v in vae.state_dict().items()}, assign=True)


def active_dropout(vae):
    for module in vae.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    vae.train()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (replaced_module, RuntimeError, "were replaced before the backward pass"),
        (replaced_weights, RuntimeError, "were replaced before the backward pass"),
        (active_dropout, ValueError, "active dropout would differ"),
    ],
)
def test_a_vae_that_is_changed_before_the_backward_pass(change, error, sentence):
    vae = build("wan2.1")
    z = latents_for(vae, 3).requires_grad_()
    for strategy in NODES:
        frames = chopgrad.decode(chopgrad.decoder_for(vae.eval()), z, strategy)
        change(vae)
        with pytest.raises(error, match=sentence):
            frames.mean().backward()


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(offload=True, pieces=True), Chop(9)], ids=str)
def test_freezing_before_the_backward_pass_is_what_it_is_elsewhere(strategy):
    """As the two steps of a GAN do it: the latents get their gradient, a frozen weight gets none."""
    vae = build("wan2.1")
    z = latents_for(vae, 3).requires_grad_()
    results = []
    for form in (lambda: vae.decode(z).sample, lambda: chopgrad.decode(chopgrad.decoder_for(vae), z, strategy)):
        vae.decoder.requires_grad_(True)
        loss = form().square().mean()
        vae.decoder.requires_grad_(False)
        z.grad = None
        loss.backward()
        results.append(z.grad)
        assert all(p.grad is None and not p.requires_grad for p in vae.decoder.parameters())
    assert relative_error(results[1], results[0]) < 1e-12


def test_in_a_compiled_function():
    vae = build("wan2.1")
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 3).requires_grad_()
    net = torch.nn.Conv3d(3, 1, 1).double()

    def loss(z):
        return net(chopgrad.decode(decoder, z)).square().mean()

    (expected,) = torch.autograd.grad(loss(z), z)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="eager")(z), z)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-12
