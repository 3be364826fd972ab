"""What a VAE's own decode would do and a step would not: honoured, or refused by one sentence."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full, decoder_for, frame_loss
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for

STRATEGIES = [Full(), Exact(offload=False), Exact(offload=True, pieces=True)]


def offloaded_in_groups(vae, *settings):
    try:
        apply_group_offloading(vae, torch.device("cpu"), torch.device("cpu"), *settings)
    except RuntimeError as error:  # diffusers 0.36 with torch 2.6
        if "Cannot access accelerator device" not in str(error):
            raise
        pytest.skip("these versions offload in groups only where there is an accelerator")


class Brighter(AutoencoderKLWan):
    def _decode(self, z, return_dict=True):
        (frames,) = super()._decode(z, return_dict=False)
        return (1.5 * frames,)


class Plain(AutoencoderKLWan):
    """Overrides nothing of what is decoded."""

    def describe(self):
        return "mine"


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, *args, **settings):
        return self.inner(*args, **settings) * self.gain

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def overridden(vae):
    vae.__class__ = Brighter


def instance_decode(vae):
    own = vae.decode
    vae.decode = lambda z, **settings: own(0.5 * z, **settings)


def instance_forward(vae):
    own = vae.decoder.forward
    vae.decoder.forward = lambda *args, **settings: 0.5 * own(*args, **settings)


def wrapped_decoder(vae):
    vae.decoder = Wrapper(vae.decoder)


def hook(name, method="register_forward_hook", function=lambda *arguments: None):
    def change(vae):
        getattr(vae.get_submodule(name), method)(function)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (overridden, r"vae\._decode is not that of diffusers but of tests\..*\.Brighter.*CausalDecoder"),
        (instance_decode, r"vae\.decode is not that of diffusers but of tests\.chopgrad\.test_own"),
        (instance_forward, r"vae\.decoder\.forward is not that of diffusers"),
        (wrapped_decoder, r"vae\.decoder\.forward is not that of diffusers but of tests\..*\.Wrapper"),
        (hook("decoder.mid_block"), r"A hook on 'decoder\.mid_block' of the VAE .*would not be run"),
        (hook("decoder"), r"A hook on 'decoder' of the VAE"),
        (hook("decoder.up_blocks.0.resnets.0", "register_forward_pre_hook"), r"resnets\.0' of the VAE"),
        (hook("decoder.up_blocks.0", "register_full_backward_hook"), r"'decoder\.up_blocks\.0' of the VAE"),
        (lambda vae: vae.enable_tiling(), r"The VAE tiles.*call vae\.disable_tiling\(\)"),
        (lambda vae: offloaded_in_groups(vae, "block_level", 1), "or offloading by blocks"),
    ],
)  # fmt: skip
def test_what_would_be_passed_by_is_refused(change, sentence):
    vae = build("wan2.1")
    change(vae)
    with pytest.raises(ValueError, match=sentence):
        decoder_for(vae)


def test_a_change_that_only_shows_in_the_frames_is_found_by_trial(monkeypatch):
    vae = build("wan2.1")
    own = type(vae.decoder.mid_block).forward
    monkeypatch.setattr(type(vae.decoder.mid_block), "forward", lambda self, *a, **k: 0.5 * own(self, *a, **k))
    with pytest.raises(ValueError, match=r"gives something else than this decoder .relative difference .*check=False"):
        decoder_for(vae)
    assert decoder_for(vae, check=False).passed_by == []


def test_a_class_of_the_same_name_from_elsewhere():
    foreign = type("AutoencoderKLWan", (nn.Module,), {"decode": lambda self, z: z, "decoder": nn.Identity()})
    with pytest.raises(ValueError, match=r"vae\.decode is not that of diffusers.*from_single_file"):
        decoder_for(foreign())
    with pytest.raises(ValueError, match=r"No causal decoder is known for WanVAE_.*from_single_file"):
        decoder_for(type("WanVAE_", (nn.Module,), {})())


@pytest.mark.parametrize("change", [hook("decoder.mid_block"), lambda vae: vae.enable_tiling()], ids=["hook", "tiling"])
def test_a_change_after_decoder_for_is_found_at_the_call(change):
    vae = build("wan2.1")
    decoder = decoder_for(vae)
    z = latents_for(vae, 2).requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    change(vae)
    for call in (
        lambda: frame_loss(decoder, z, target, F.mse_loss),
        lambda: chopgrad.decode(decoder, z),
        lambda: decoder.decode(z),
    ):
        with pytest.raises(ValueError, match=r"would not be run|The VAE tiles"):
            call()


def check(vae, z, model=None, tolerance=1e-12):
    """Frames and gradients of all three forms against the VAE's own decode."""
    leaf = z.clone().requires_grad_()
    frames = vae.decode(leaf).sample
    target = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)).to(frames)
    trained = [p for p in vae.decoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(F.mse_loss(frames, target), [leaf, *trained])
    for strategy in STRATEGIES:
        decoder = decoder_for(vae if model is None else model)
        for loss in (
            frame_loss(decoder, leaf, target, F.mse_loss, strategy),
            F.mse_loss(chopgrad.decode(decoder, leaf, strategy), target),
        ):
            got = torch.autograd.grad(loss, [leaf, *trained])
            assert all(relative_error(a, b) < tolerance for a, b in zip(got, expected, strict=True)), strategy


def test_a_subclass_that_overrides_nothing_of_it():
    vae = build("wan2.1")
    vae.__class__ = Plain
    check(vae, latents_for(vae, 3))


def test_hooks_on_convolutions_and_norms_are_run():
    vae = build("wan2.1")
    vae.decoder.conv_in.register_forward_hook(lambda module, arguments, out: 0.5 * out)
    vae.decoder.mid_block.resnets[0].norm1.register_forward_pre_hook(lambda module, arguments: (1 + arguments[0],))
    check(vae, latents_for(vae, 3))


def test_lora_in_the_vae():
    vae = build("wan2.1")
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["to_qkv", "proj"], init_lora_weights=False)
    model = peft.get_peft_model(vae, settings).double()
    assert any(p.requires_grad for p in vae.decoder.parameters())
    check(vae, latents_for(vae, 3), model)


def test_compiled_modules(monkeypatch):
    vae = build("wan2.1")
    compiled = torch.compile(vae, backend="eager")
    check(vae, latents_for(vae, 3), compiled)
    vae.decode = torch.compile(vae.decode, backend="eager")
    assert decoder_for(vae).vae is vae
    del vae.decode
    vae.decoder = torch.compile(vae.decoder, backend="eager")
    assert decoder_for(vae).vae is vae


@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm(parametrize):
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    for module in list(vae.decoder.modules()):
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            parametrize(module)
    check(vae.double(), latents_for(vae, 3))


def test_spectral_norm_in_training_mode_is_refused_where_steps_repeat():
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    nn.utils.parametrizations.spectral_norm(vae.decoder.conv_in)
    vae.double().train()
    before = [x.clone() for x in vae.buffers()]
    decoder = decoder_for(vae)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.buffers(), strict=True))  # the trial changes nothing
    z = latents_for(vae, 3).requires_grad_()
    other = copy.deepcopy(vae)
    expected = torch.autograd.grad(other.decode(z).sample.square().mean(), z)[0]
    for call in (
        lambda: chopgrad.decode(decoder, z),
        lambda: frame_loss(decoder, z, None, lambda x, _: x.mean(), Exact(offload=False)),
    ):
        with pytest.raises(RuntimeError, match=r"buffer 'decoder\.conv_in.*call vae\.eval\(\)"):
            call()
    got = torch.autograd.grad(chopgrad.decode(decoder_for(copy.deepcopy(vae).train()), z, Full()).square().mean(), z)[0]
    assert got.isfinite().all() and expected.isfinite().all()
    vae.eval()
    check(vae, z.detach())


def leaf_level(vae):
    offloaded_in_groups(vae, "leaf_level")
    return vae


def whole_model(vae):
    return pytest.importorskip("accelerate").cpu_offload_with_hook(vae, execution_device="cpu")[0]


def weights_on_meta(vae):
    return pytest.importorskip("accelerate").cpu_offload(vae, execution_device="cpu")


@pytest.mark.parametrize("offload", [leaf_level, whole_model, weights_on_meta])
def test_offloading_that_plain_decode_works_with(offload):
    vae = build("wan2.1")
    check(offload(vae), latents_for(build("wan2.1"), 3))


def test_a_pipelines_offloading_is_asked_before_each_pass():
    """What ``enable_model_cpu_offload`` leaves on the VAE is called where its own decode would call it, and again
    before the backward pass, when another model may have taken its place."""
    vae = build("wan2.1")

    class Hook:
        calls = 0

        def pre_forward(self, module, *args, **settings):
            Hook.calls += 1

    vae._hf_hook = Hook()
    decoder = decoder_for(vae)
    z = latents_for(vae, 2).requires_grad_()
    before = Hook.calls
    frames = chopgrad.decode(decoder, z)
    assert Hook.calls == before + 1
    frames.mean().backward()
    assert Hook.calls == before + 2


@pytest.mark.parametrize("name", ["DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"])
def test_wrappers_that_split_a_model(name):
    wrapper = type(name, (nn.Module,), {})()
    with pytest.raises(ValueError, match=rf"the VAE is wrapped in {name}.*\.module"):
        decoder_for(wrapper)
    vae = build("wan2.1")
    vae.decoder = wrapper
    with pytest.raises(ValueError, match=rf"vae\.decoder is wrapped in {name}.*\.module"):
        decoder_for(vae)


@pytest.mark.parametrize("name", VAES)
def test_the_trial_finds_blocks_and_leaves_nothing_behind(name):
    vae = build(name)
    decoder = decoder_for(vae)
    names = {x.name for x in decoder.passed_by}
    assert {"decoder", "decoder.mid_block", "decoder.up_blocks.0"} <= names
    assert not any("conv" in n.rsplit(".")[-1] for n in names)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in vae.modules())
    assert decoder_for(vae, check=False).passed_by == []


def test_a_decoder_in_low_precision_passes_the_trial():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        decoder_for(build("wan2.1", dtype))


def test_what_the_trial_makes_the_vae_leave_is_taken_off(monkeypatch):
    vae = build("wan2.1")
    vae.kept, vae.listed = torch.ones(1), [None, torch.ones(1)]
    mine = vae.kept
    clear = type(vae).clear_cache

    def leaves(self):
        clear(self)
        self.left, self.kept = torch.zeros(1), torch.zeros(1)
        self.listed[0] = torch.zeros(1)

    monkeypatch.setattr(type(vae), "clear_cache", leaves)
    decoder_for(vae)
    assert "left" not in vars(vae)
    assert vae.kept is mine
    assert vae.listed[0] is None
    assert torch.equal(vae.listed[1], torch.ones(1))


@pytest.mark.parametrize(
    "strategy", [Exact(offload=False), Exact(offload=True, pieces=True), Chop(9, recompute=True)], ids=str
)
def test_random_numbers_of_a_hook_are_refused_where_steps_repeat(strategy):
    vae = build("wan2.1")
    decoder, z = decoder_for(vae), latents_for(vae, 3).requires_grad_()
    vae.decoder.conv_in.register_forward_hook(lambda module, how, y: y + 0.1 * torch.randn_like(y))
    target = torch.zeros_like(decoder.decode(z.detach()))
    for run in (
        lambda: chopgrad.decode(decoder, z, strategy),
        lambda: frame_loss(decoder, z, target, F.mse_loss, strategy),
    ):
        with pytest.raises(RuntimeError, match="draws random numbers whenever it runs"):
            run()
    chopgrad.decode(decoder, z, Full()).mean().backward()
    with torch.no_grad():
        chopgrad.decode(decoder, z, strategy)  # nothing is run twice


def test_settings_that_change_before_the_backward_pass_are_refused():
    vae = build("wan2.1")
    decoder, z = decoder_for(vae), 9 * latents_for(vae, 3).requires_grad_()
    frames = chopgrad.decode(decoder, z, Exact(offload=False))
    vae.enable_tiling()
    with pytest.raises(RuntimeError, match=r"vae.use_tiling was changed before the backward pass"):
        frames.mean().backward()
    vae.disable_tiling()
    expected = torch.autograd.grad(chopgrad.decode(decoder, z, Full()).sum(), z)[0]
    frames = chopgrad.decode(decoder, z, Exact(offload=False))
    decoder.clamp = False  # for later calls
    assert relative_error(torch.autograd.grad(frames.sum(), z)[0], expected) < 1e-12
    assert (
        relative_error(torch.autograd.grad(chopgrad.decode(decoder, z, Exact(offload=False)).sum(), z)[0], expected)
        > 0.01
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_trial_in_half_precision_sees_a_block_that_is_another(dtype):
    vae = build("wan2.1", dtype)
    block = vae.decoder.mid_block.resnets[0]
    plain = type(block)

    def louder(self, *args, **kwargs):
        return 1.2 * plain.forward(self, *args, **kwargs)

    block.__class__ = type("Louder", (plain,), {"forward": louder})
    with pytest.raises(ValueError, match="gives something else than this decoder"):
        decoder_for(vae)
    decoder_for(build("wan2.1", dtype))


def test_a_decoder_that_gives_nan_is_refused(monkeypatch):
    cls = chopgrad.DECODERS["AutoencoderKLWan"]
    monkeypatch.setattr(cls, "clamped", lambda self, frames: frames * float("nan"))
    with pytest.raises(ValueError, match=r"gives something else than this decoder \(relative difference nan"):
        decoder_for(build("wan2.1"))


def test_a_function_put_on_the_class_is_seen(monkeypatch):
    vae = build("wan2.1", torch.bfloat16)
    monkeypatch.setattr(AutoencoderKLWan, "_decode", lambda self, z, return_dict=True: (z,))
    with pytest.raises(ValueError, match=r"vae\._decode is not that of diffusers but of tests\.chopgrad\.test_own"):
        decoder_for(vae)


def test_a_block_that_is_replaced_later_is_told():
    vae = build("wan2.1")
    decoder, z = decoder_for(vae), latents_for(vae, 2)
    block = vae.decoder.mid_block.resnets[0]
    block.__class__ = type("Other", (type(block),), {})
    with pytest.raises(ValueError, match=r"'decoder\.mid_block\.resnets\.0' of the VAE has become a Other"):
        decoder.decode(z)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_encoder_and_decoder_may_differ_in_precision(half):
    of_encoder, of_decoder = (torch.bfloat16 if half == part else torch.float32 for part in ("encoder", "decoder"))
    vae = build("wan2.1", torch.float32)
    for part, dtype in ((vae.encoder, of_encoder), (vae.quant_conv, of_encoder)):
        nn.Module.to(part, dtype)
    for part, dtype in ((vae.decoder, of_decoder), (vae.post_quant_conv, of_decoder)):
        nn.Module.to(part, dtype)
    z = latents_for(build("wan2.1", torch.float32), 3).to(of_decoder).requires_grad_()
    frames = chopgrad.decode(decoder_for(vae), z)
    assert frames.dtype == of_decoder
    assert relative_error(frames.detach(), vae.decode(z).sample.detach()) < 0.01
    frames.mean().backward()


def test_what_fails_in_a_step_alone_is_told_by_the_trial(monkeypatch):
    def fails(self, features, cached):
        raise RuntimeError("mine")

    monkeypatch.setattr(chopgrad.DECODERS["AutoencoderKLWan"], "_entry", fails)
    with pytest.raises(ValueError, match=r"AutoencoderKLWan.decode runs, but not this decoder: RuntimeError: mine"):
        decoder_for(build("wan2.1"))
