"""``encode``: the encoder is the same recurrence, with the same engine, strategies and guarantees as ``decode``.

The reference is plain back-propagation through the VAE's own encode in float64, and for truncation a graph with one
copy of the model per group.
"""

import copy
import gc
import warnings

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from chopgrad.encoders import OriginalWanEncoder
from chopgrad.memory import PeakMemory
from chopgrad.shapes import ShapesOnly
from tests.brute_force import relative_error
from tests.chopgrad import test_original_wan
from tests.models import QWEN_SLOWLY, VAES, build, twin

ORIGINAL = list(test_original_wan.CLASSES)
EXACT = [
    *(Full(), Exact(offload=False), Exact(every=2), Exact(pieces=True), Exact(offload=True, pieces=True, every=2)),
    *(Chop(9), Chop(4, block=2, recompute=True), Chop(9, block=2, recompute=True, pieces=True), Chop(9, offload=True)),
]
TRUNCATED = [Chop(0), Chop(1), Chop(1, block=2), Chop(1, recompute=True), Chop(1, block=3, recompute=True, pieces=True)]
FITTING = {"cogvideox": [1, 8, 9, 16, 25, 32]}
TOLERANCE = 1e-12
ALL = slice(None)


@pytest.fixture(autouse=True)
def _quiet_about_trainable_encoders():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*parameters of the (en|de)coder")
        yield


def vae_of(name, dtype=torch.float64):
    return test_original_wan.build(name, dtype) if name in ORIGINAL else build(name, dtype)


def fitting(name):
    """Numbers of frames of one to four groups."""
    return FITTING.get(name, [1, 5, 9, 13])


def video_for(encoder, frames, batch=1, seed=1, scale=2):
    """Of 2x2 latents."""
    generator, size = torch.Generator().manual_seed(seed), scale * encoder.spatial_factor
    x = torch.randn(batch, encoder.source_channels, frames, size, size, generator=generator, dtype=torch.float64)
    return x.to(next(encoder.parameters()).dtype)


def case(name="wan2.1", frames=9, trainable=False, batch=1, dtype=torch.float64, **settings):
    vae = vae_of(name, dtype).requires_grad_(trainable)
    encoder = chopgrad.encoder_for(vae, **settings)
    return vae, encoder, video_for(encoder, frames, batch).requires_grad_()


def any_loss(moments):
    """Every latent with every other."""
    x = moments.transpose(1, 2).flatten(2)
    return (x @ x.transpose(1, 2)).square().mean() + moments.sum().sin()


def gradients(moments, tensors, loss=any_loss, **settings):
    return torch.autograd.grad(loss(moments), tensors, allow_unused=True, **settings)


def assert_same(found, expected, tolerance=TOLERANCE):
    largest = max(x.norm().item() for x in expected if x is not None)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).norm().item() <= tolerance * max(y.norm().item(), 1e-3 * largest)


@pytest.mark.parametrize("name", [*VAES, *ORIGINAL])
def test_moments_and_gradients_are_those_of_its_own_encode(name):
    vae, encoder, _ = case(name, trainable=True)
    parameters = list(encoder.parameters())
    quantisation = vae.conv1 if name in ORIGINAL else vae.quant_conv
    used = len(list(vae.encoder.parameters())) + (len(list(quantisation.parameters())) if quantisation else 0)
    assert len(parameters) == used
    for k, frames in enumerate(fitting(name)):
        video = video_for(encoder, frames, batch=1 + k % 2).requires_grad_()
        theirs = encoder.own_encode(video)
        assert theirs.shape[1] == 2 * 4
        assert theirs.shape[2] == encoder.latent_count(frames)
        plain = gradients(theirs, [video, *parameters])
        for strategy in EXACT[k % 2 :: 2]:
            ours = chopgrad.encode(encoder, video, strategy)
            assert relative_error(ours.detach(), theirs.detach()) < 1e-14
            assert_same(gradients(ours, [video, *parameters]), plain)


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_what_the_vae_itself_hands_out(name):
    vae, encoder, video = case(name, fitting(name)[2])
    for slicing in (False, True):
        vae.use_slicing = slicing
        theirs = vae.encode(video).latent_dist
        ours = DiagonalGaussianDistribution(chopgrad.encode(encoder, video))
        for a, b in ((ours.mean, theirs.mean), (ours.std, theirs.std), (ours.kl(), theirs.kl())):
            assert relative_error(a.detach(), b.detach()) < 1e-14


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_a_step_is_pure_and_groups_tile(name):
    vae, encoder, _ = case(name)
    for frames in fitting(name):
        video, state, before = video_for(encoder, frames), encoder.initial_state(), [0, 0]
        for group in encoder.latent_groups(frames):
            assert [group.frames.start, group.latents.start] == before
            copies = [x.clone() for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
            first, after = encoder.step(video[:, :, group.frames], state)
            again, _ = encoder.step(video[:, :, group.frames], state)
            assert torch.equal(first, again) and first.shape[2] == group.latent_count
            kept = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
            assert all(torch.equal(a, b) for a, b in zip(copies, kept, strict=True))
            state, before = after, [group.frames.stop, group.latents.stop]
        assert before == [frames, encoder.latent_count(frames)]
    assert not list(tensors_on_modules(vae))


@pytest.mark.parametrize("checkpoint", ["frame", "residual", "block"])
@pytest.mark.parametrize("name", [*VAES, "Wan 2.2"])
def test_recomputing_inside_a_group_changes_nothing(name, checkpoint):
    _, encoder, video = case(name, fitting(name)[2], trainable=True, checkpoint=checkpoint)
    tensors = [video, *encoder.parameters()]
    plain = gradients(encoder.own_encode(video), tensors)
    for strategy in (Full(), Exact(offload=False), Exact(pieces=True), Chop(9, block=2, recompute=True, pieces=True)):
        assert_same(gradients(chopgrad.encode(encoder, video, strategy), tensors), plain)


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_recomputing_takes_less_memory(name, stock_graphs):
    def peak(checkpoint):
        _, encoder, _ = case(name, checkpoint=checkpoint)
        video = video_for(encoder, fitting(name)[3], scale=4).requires_grad_()
        with PeakMemory() as memory:
            any_loss(chopgrad.encode(encoder, video, Full())).backward()
        return memory.peak_bytes

    plain = peak(None)
    for mode in ("block", "residual", "frame"):
        assert peak(mode) < 0.9 * plain


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(offload=True, pieces=True), Chop(9)], ids=str)
@pytest.mark.parametrize("name", ["wan2.2", "cogvideox"])
def test_a_video_from_a_file_and_a_frozen_encoder(name, strategy):
    vae, encoder, video = case(name, fitting(name)[2], trainable=True)
    parameters = list(encoder.parameters())
    plain = gradients(encoder.own_encode(video), [video, *parameters])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_file = chopgrad.encode(encoder, video.detach(), strategy)
        assert_same(gradients(from_file, parameters), plain[1:])
        vae.requires_grad_(False)
        assert_same(gradients(chopgrad.encode(encoder, video, strategy), [video]), plain[:1])
        assert not chopgrad.encode(encoder, video.detach(), strategy).requires_grad
        vae.encoder.conv_out.requires_grad_(True)
        some = [p for p in encoder.parameters() if p.requires_grad]
        assert_same(
            gradients(chopgrad.encode(encoder, video.detach(), strategy), some),
            [g for g, p in zip(plain[1:], parameters) if p.requires_grad],
        )


# Truncation


def truncated(vae, video, strategy, loss=any_loss, groups=ALL, history=True):
    """Gradients of video and encoder parameters: dL/dm_i reaches group j iff j <= i <= end of j's block + D.

    One graph over the whole video, one copy of the model per group, and nothing of the engine.
    """
    spans = chopgrad.encoder_for(vae, check=False).latent_groups(video.shape[2])
    chosen = range(len(spans))[groups]
    encoders = [chopgrad.encoder_for(twin(vae), check=False) for _ in range(chosen.stop)]
    parts = [video[:, :, span.frames].detach().requires_grad_() for span in spans[: chosen.stop]]
    found, state = [], encoders[0].initial_state()
    for encoder, part in zip(encoders, parts):
        moments, state = encoder.step(part, state)
        found.append(moments)
    asked = [found[i] for i in chosen]
    adjoints = dict(zip(chosen, torch.autograd.grad(loss(torch.cat(asked, dim=2)), asked, retain_graph=True)))
    of_video, of_parameters = torch.zeros_like(video), [0.0 for _ in encoders[0].parameters()]
    block, start = getattr(strategy, "block", None), chosen.start
    for j in range(0 if history else start, chosen.stop):
        end = start + ((j - start) // block + 1) * block if block else chosen.stop
        kept = [i for i in chosen if j <= i <= end - 1 + getattr(strategy, "distance", 0)]
        if kept:
            sources = [parts[j], *encoders[j].parameters()]
            of_part, *rest = torch.autograd.grad(
                [found[i] for i in kept], sources, [adjoints[i] for i in kept], retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            of_video[:, :, spans[j].frames] = of_part
            of_parameters = [a + b for a, b in zip(of_parameters, rest, strict=True)]
    return [of_video, *of_parameters]


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_a_chop_against_brute_force(name):
    frames = {"cogvideox": 41}.get(name, 17)
    vae, encoder, video = case(name, frames, trainable=True)
    tensors = [video, *encoder.parameters()]
    exact = truncated(vae, video, Exact(offload=False))
    assert_same(gradients(encoder.own_encode(video), tensors, materialize_grads=True), exact)
    for strategy in TRUNCATED:
        expected = truncated(vae, video, strategy)
        found = gradients(chopgrad.encode(encoder, video, strategy), tensors, materialize_grads=True)
        assert_same(found, expected)
        assert relative_error(found[0], exact[0]) > 1e-6


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize(
    "strategy", [Full(), Exact(offload=False), Exact(pieces=True), Chop(1), Chop(1, block=2)], ids=str
)
@pytest.mark.parametrize("name", ["wan2.2", "cogvideox"])
def test_some_groups_against_brute_force(name, strategy, history):
    vae, encoder, video = case(name, fitting(name)[-1], trainable=True)
    spans, whole = encoder.latent_groups(video.shape[2]), encoder.encode(video).detach()
    tensors = [video, *encoder.parameters()]
    for groups in (slice(1, 3), slice(-2, None), slice(None, 1)):
        moments, chosen = chopgrad.encode(encoder, video, strategy, groups=groups, history=history), spans[groups]
        assert torch.equal(moments, whole[:, :, chosen[0].latents.start : chosen[-1].latents.stop])
        found = gradients(moments, tensors, materialize_grads=True)
        assert_same(found, truncated(vae, video, strategy, groups=groups, history=history))
        assert history or not found[0][:, :, : chosen[0].frames.start].any()
        assert not found[0][:, :, chosen[-1].frames.stop :].any()


# Memory


@pytest.mark.parametrize("strategy", [Chop(1), Chop(1, block=2, recompute=True, pieces=True)], ids=str)
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox"])
def test_memory_of_a_chop_does_not_depend_on_the_number_of_frames(name, strategy):
    step = 8 if name == "cogvideox" else 4

    def peak(groups):
        _, encoder, video = case(name, step * groups + 1)
        with PeakMemory() as memory:
            moments = chopgrad.encode(encoder, video, strategy)
            moments.backward(torch.ones((), dtype=video.dtype).expand_as(moments))
        return memory.peak_bytes - video.nbytes - moments.nbytes  # the video's gradient is as long as the video

    assert peak(9) <= 1.02 * peak(6)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_memory_of_full_grows_with_the_number_of_frames(name, stock_graphs):
    step = 8 if name == "cogvideox" else 4

    def peak(groups, strategy):
        _, encoder, video = case(name, step * groups + 1)
        with PeakMemory() as memory:
            any_loss(chopgrad.encode(encoder, video, strategy)).backward()
        return memory.peak_bytes

    full, exact = peak(8, Full()), peak(8, Exact(offload=False))
    assert full > 1.7 * peak(4, Full())
    assert exact < 0.8 * full
    assert peak(8, Exact(every=3)) < exact


@pytest.mark.parametrize(("name", "trainable"), [("wan2.1", True), ("wan2.2", False), ("cogvideox", True)])
def test_device_memory_with_offload_does_not_depend_on_the_number_of_frames(name, trainable):
    """On tensors without data, where "meta" plays the device and the CPU is the host."""
    step = 8 if name == "cogvideox" else 4

    def peaks(groups, **settings):
        with ShapesOnly(), torch.device("meta"):
            encoder = chopgrad.encoder_for(VAES[name]().eval().requires_grad_(trainable))
            size = 2 * encoder.spatial_factor
            video = torch.zeros(1, 3, step * groups + 1, size, size, requires_grad=not trainable)
            with PeakMemory("meta") as memory:
                moments = chopgrad.encode(encoder, video, Exact(offload=True, **settings))
                moments.backward(torch.ones(()).expand_as(moments))
        return memory.peak_bytes - video.nbytes * (not trainable) - moments.nbytes, memory.host_peak_bytes

    whole, short, long = peaks(5), peaks(5, pieces=True), peaks(8, pieces=True)
    assert short[0] < 0.9 * whole[0]
    assert long[0] <= 1.02 * short[0]
    assert long[1] > short[1]
    assert peaks(8, pieces=True, every=3)[1] < 0.9 * long[1]


@pytest.mark.parametrize("strategy", [Exact(offload=False), Exact(offload=True, pieces=True), Chop(1), Full()], ids=str)
def test_what_waits_is_freed(strategy):
    _, encoder, video = case()
    gc.disable()
    try:
        with PeakMemory() as memory:
            moments = chopgrad.encode(encoder, video, strategy)
            moments.backward(torch.ones_like(moments))
            assert memory.live_bytes("cpu") <= moments.nbytes + video.grad.nbytes + 8
            del moments
            moments = chopgrad.encode(encoder, video, strategy)
            del moments
            assert memory.live_bytes("cpu") <= video.grad.nbytes
    finally:
        gc.enable()


def tensors_on_modules(vae):
    for module in vae.modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        yield from (x for x in tree_leaves(own) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", *ORIGINAL])
def test_modules_are_clean_after_success_and_after_an_error(name):
    vae, encoder, video = case(name)

    def check():
        assert not list(tensors_on_modules(vae))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())
        assert "encode" not in vars(vae)

    check()
    for strategy in (Full(), Exact(pieces=True), Chop(1)):
        moments = chopgrad.encode(encoder, video, strategy)
        moments.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("the user's own error")))
        with pytest.raises(RuntimeError, match="the user's own error"):
            moments.sum().backward()
        check()
    (encoder.vae.quant_conv or vae.encoder.conv_out if name in VAES else vae.conv1).register_forward_hook(failing)
    for run in (lambda x: chopgrad.encode(encoder, x), *([encoder.own_encode] if name in ORIGINAL else [])):
        with pytest.raises(RuntimeError, match="an error inside"):
            run(video)
        assert not list(tensors_on_modules(vae))
        assert name in VAES or len(vae.conv1._forward_hooks) == 1


def failing(*how):
    raise RuntimeError("an error inside")


# An ordinary node


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(offload=True, pieces=True), Chop(1)], ids=str)
def test_backward_twice_with_retain_graph_and_not_without(strategy):
    _, encoder, video = case(trainable=True)
    tensors = [video, encoder.vae.encoder.conv_in.weight]
    moments = chopgrad.encode(encoder, video, strategy)
    first, second, third = (gradients(moments, tensors, retain_graph=kept) for kept in (True, True, False))
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(moments, tensors)


@pytest.mark.parametrize("of_latents", [chopgrad.decode, chopgrad.frame_loss])
def test_a_whole_vae_is_trained(of_latents):
    """Encode, sample, decode: every gradient of both halves is that of plain back-propagation through both."""
    vae, encoder, video = case("wan2.2", trainable=True)
    decoder = chopgrad.decoder_for(vae)
    noise = torch.randn(1, 4, encoder.latent_count(9), 2, 2, dtype=torch.float64)

    def parts(moments):
        posterior = DiagonalGaussianDistribution(moments)
        return posterior.mean + posterior.std * noise, 1e-2 * posterior.kl().mean()

    def step():
        z, kl = parts(chopgrad.encode(encoder, video))
        if of_latents is chopgrad.frame_loss:
            return kl + chopgrad.frame_loss(decoder, z, video.detach(), F.l1_loss)
        return kl + F.l1_loss(chopgrad.decode(decoder, z), video.detach())

    tensors = [video, *encoder.parameters(), *decoder.parameters()]
    assert len(tensors) == 1 + len(list(vae.parameters()))
    z, kl = parts(vae.encode(video).latent_dist.parameters)
    plain = torch.autograd.grad(kl + F.l1_loss(vae.decode(z).sample, video.detach()), tensors)
    assert_same(torch.autograd.grad(step(), tensors), plain, 1e-11)


@pytest.mark.parametrize(
    "strategy", [Full(), Exact(offload=False), Exact(pieces=True), Chop(4, recompute=True)], ids=str
)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_in_bfloat16_the_error_is_stocks(name, strategy):
    def gradient(dtype, own):
        _, encoder, _ = case(name, dtype=dtype)
        video = video_for(case(name, dtype=torch.float32)[1], fitting(name)[2]).to(dtype).requires_grad_()
        moments = encoder.own_encode(video) if own else chopgrad.encode(encoder, video, strategy)
        weight = torch.randn(moments.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.autograd.grad((moments * weight).sum(), video)[0].float()

    exact = gradient(torch.float32, own=True)
    stock = relative_error(gradient(torch.bfloat16, own=True), exact)
    assert 0 < relative_error(gradient(torch.bfloat16, own=False), exact) < 2 * stock


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(pieces=True), Chop(4)], ids=str)
def test_under_autocast(strategy):
    _, encoder, video = case(dtype=torch.float32, trainable=True)
    tensors = [video, *encoder.parameters()]

    def found(run, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            moments = run(video)
        return torch.cat([g.flatten().float() for g in gradients(moments.float(), tensors, loss=torch.sum)])

    true = found(encoder.own_encode, half=False)
    stock = relative_error(found(encoder.own_encode, half=True), true)
    assert 0 < relative_error(found(lambda x: chopgrad.encode(encoder, x, strategy), half=True), true) < 2 * stock


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda x: x[0],
            ValueError,
            r"video must be a tensor \[batch, 3, frames, height, width\], got \[3, 5, 4, 4\]. For an image",
        ),
        (lambda x: x.tolist(), ValueError, "video must be a tensor.*got list"),
        (
            lambda x: x[:, :2],
            ValueError,
            r"video has 2 channels, but this encoder takes 3: pass \[batch, 3, frames, height, width\]; got \[1, 2,",
        ),
        (lambda x: x.to("meta"), ValueError, "video is on meta, but the encoder is on cpu: move one"),
        (lambda x: x.float(), TypeError, "video is torch.float32, but the encoder is torch.float64: cast one"),
        (lambda x: x.long(), TypeError, "video must be floating point, got torch.int64"),
        (lambda x: x[:, :, :0], ValueError, "At least one frame is needed, got 0"),
        (lambda x: x[:0], ValueError, "video is empty"),
        (
            lambda x: x[:, :, :4],
            ValueError,
            r"4 frames do not fit.*1 \+ 4k, and the VAE's own encode drops the last 3.*Pass 1 or 5 frames",
        ),
    ],
)
def test_videos_that_are_refused(change, error, sentence):
    _, encoder, video = case(frames=5)
    with pytest.raises(error, match=sentence):
        chopgrad.encode(encoder, change(video.detach()))


@pytest.mark.parametrize(("name", "frames", "fit"), [
    *(("wan2.1", n, "5 or 9") for n in (6, 7, 8)), ("Wan 2.2", 10, "9 or 13"), ("qwen", 2, "1 or 5"),
    ("cogvideox", 2, "1 or 8"), ("cogvideox", 7, "1 or 8"), ("cogvideox", 10, "9 or 16"), ("cogvideox", 15, "9 or 16"),
])  # fmt: skip
def test_numbers_of_frames_that_are_refused(name, frames, fit):
    _, encoder, _ = case(name)
    with pytest.raises(ValueError, match=f"{frames} frames do not fit the encoder's groups: .*Pass {fit} frames"):
        encoder.encode(video_for(encoder, frames))


def test_upstream_drops_the_frames_that_are_refused():
    vae, encoder, _ = case()
    video = video_for(encoder, 8)
    assert torch.equal(vae.encode(video).latent_dist.mean, vae.encode(video[:, :, :5]).latent_dist.mean)


def test_settings_that_are_refused():
    vae, encoder, video = case()
    with pytest.raises(TypeError, match=r"encoder must come from chopgrad.encoder_for\(vae\), got WanDecoder"):
        chopgrad.encode(chopgrad.decoder_for(vae), video)
    with pytest.raises(TypeError, match=r"decoder must come from chopgrad.decoder_for\(vae\), got WanEncoder"):
        chopgrad.decode(encoder, video)
    with pytest.raises(TypeError, match=r"Sampled\(.*encode hands out moments: pass Chop.*groups=slice\(...\)\.$"):
        chopgrad.encode(encoder, video, Sampled(1, Chop(1)))
    with pytest.raises(ValueError, match=r"has none of the 3 groups"):
        chopgrad.encode(encoder, video, groups=slice(3, None))
    with pytest.raises(ValueError, match="checkpoint must be"):
        chopgrad.encoder_for(vae, checkpoint="all")
    with pytest.raises(ValueError, match=r"No causal encoder is known for Linear. Supported: AutoencoderKLCogVideoX, "):
        chopgrad.encoder_for(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"encoder must be a subclass of chopgrad.CausalEncoder, got <class"):
        chopgrad.register_encoder("Mine", chopgrad.CausalDecoder)


def test_dropout_is_refused_where_steps_run_twice():
    vae, encoder, video = case()
    vae.train()
    vae.encoder.mid_block.resnets[0].dropout.p = 0.5
    with pytest.raises(ValueError, match=r"active dropout would differ between them: call vae.eval\(\)"):
        chopgrad.encode(encoder, video, Exact(offload=False))
    chopgrad.encode(encoder, video, Full())


def test_what_a_step_would_pass_by_is_refused():
    vae, encoder, video = case()
    hook = vae.encoder.register_forward_hook(lambda *how: None)
    with pytest.raises(ValueError, match=r"A hook on 'encoder' of the VAE .* because the encoder does not call it"):
        chopgrad.encode(encoder, video)
    hook.remove()
    vae.use_tiling = True
    with pytest.raises(ValueError, match=r"The VAE tiles \(enable_tiling\)"):
        chopgrad.encode(encoder, video)
    vae.use_tiling = False
    vae.encode = lambda x, **how: None
    with pytest.raises(ValueError, match=r"vae.encode is not that of diffusers but of .*write an encoder for it"):
        chopgrad.encoder_for(vae)
    del vae.encode
    other = copy.copy(vae)
    other.__class__ = type("Other", (type(vae),), {"_encode": lambda self, x: 2 * super(type(self), self)._encode(x)})
    with pytest.raises(ValueError, match=r"vae._encode is not that of diffusers"):
        chopgrad.encoder_for(other)
    vae.encoder.down_blocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"AutoencoderKLWan.encode gives something else than this encoder"):
        chopgrad.encoder_for(vae)
    vae.encoder = None
    with pytest.raises(ValueError, match=r"This AutoencoderKLWan has no encoder"):
        chopgrad.encoder_for(vae)


def test_attention_between_the_blocks_is_told():
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[], attn_scales=[1.0]
    )
    with pytest.raises(ValueError, match=r"WanAttentionBlock between its downsampling blocks \(attn_scales\)"):
        chopgrad.encoder_for(vae)


def test_more_compression_in_time_than_upstream_encodes_is_told():
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[True] * 3)
    with pytest.raises(ValueError, match="one latent of 8 frames, and its encode takes 4 at once"):
        chopgrad.encoder_for(vae)


def test_a_patched_decode_and_a_compiled_encode_are_passed_by():
    vae, encoder, video = case()
    with chopgrad.patch(vae):
        assert torch.equal(chopgrad.encode(chopgrad.encoder_for(vae), video), chopgrad.encode(encoder, video))
    vae.encode = torch.compile(vae.encode, backend="eager")
    assert isinstance(chopgrad.encoder_for(vae), chopgrad.CausalEncoder)


def test_a_class_of_ones_own():
    vae, encoder, video = case()
    vae.__class__ = type("Derived", (type(vae),), {})
    assert torch.equal(chopgrad.encode(chopgrad.encoder_for(vae), video), chopgrad.encode(encoder, video))

    class Mine(type(encoder)):
        package = None

    try:
        chopgrad.register_encoder("Derived", Mine)
        assert isinstance(chopgrad.encoder_for(vae), Mine)
    finally:
        del chopgrad.ENCODERS["Derived"]


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_object_around_an_original_model_is_taken(name):
    """Its own encode gives the means, normalised."""
    vae = vae_of(name)
    encoder = chopgrad.encoder_for(test_original_wan.around(vae))
    assert isinstance(encoder, OriginalWanEncoder) and encoder.vae is vae
    video = video_for(encoder, 9)
    mean, std = test_original_wan.scale()
    theirs = vae.encode(video, [mean, 1 / std])
    decoder = chopgrad.decoder_for(test_original_wan.around(vae))
    ours = decoder.normalize(chopgrad.encode(encoder, video).chunk(2, dim=1)[0])
    assert relative_error(ours.detach(), theirs) < 1e-14
