"""``patch``: ``vae.decode`` as it was, in every form, with a gradient in bounded memory; and as it was once removed."""

import copy
import warnings

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from tests.brute_force import PairwiseAdjoint, relative_error
from tests.models import VAES, build, latents_for

TOLERANCE = 1e-12
STRATEGIES = [Exact(offload=True, pieces=True), Exact(offload=False), Full(), Chop(9)]


@pytest.fixture(autouse=True)
def _quiet_about_trainable_decoders():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*parameters of the decoder")
        yield


def clip_loss(frames):
    x = frames.transpose(1, 2).flatten(2)
    return (x @ x.transpose(1, 2)).square().mean()


def gradient(vae, z):
    return torch.autograd.grad(clip_loss(vae.decode(z).sample), z)[0]


class Calls:
    """Whether chopgrad's decoder stepped: the VAE's own decode never does."""

    def __init__(self, monkeypatch):
        self.count = 0
        for cls in set(chopgrad.DECODERS.values()):
            monkeypatch.setattr(cls, "step", self.counting(cls.step))
            monkeypatch.setattr(cls, "pieces", self.counting(cls.pieces))

    def counting(self, method):
        def counted(*arguments):
            self.count += 1
            return method(*arguments)

        return counted

    def made(self):
        count, self.count = self.count, 0
        return count > 0


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_every_form_of_decode(name, strategy, monkeypatch):
    vae, calls = build(name), Calls(monkeypatch)
    z = latents_for(vae, 4, batch=2).requires_grad_()
    expected, slope = vae.decode(z).sample.detach(), gradient(vae, z)
    assert not calls.made()
    handle = chopgrad.patch(vae, strategy)
    calls.made()
    out = vae.decode(z)
    assert calls.made()
    assert type(out).__name__ == "DecoderOutput"
    (as_tuple,) = vae.decode(z, return_dict=False)
    (positional,) = vae.decode(z, False)
    (by_name,) = vae.decode(z=z, return_dict=False)
    for frames in (out.sample, as_tuple, positional, by_name):
        torch.testing.assert_close(frames.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert relative_error(gradient(vae, z), slope) < TOLERANCE
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            frames = vae.decode(z).sample
        assert not frames.requires_grad
        torch.testing.assert_close(frames.clone(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    handle.remove()
    calls.made()
    assert torch.equal(vae.decode(z).sample, expected)
    assert not calls.made()


@pytest.mark.parametrize("name", VAES)
def test_slicing_decodes_videos_one_by_one(name):
    vae = build(name)
    z = latents_for(vae, 3, batch=3).requires_grad_()
    slope = gradient(vae, z)
    vae.enable_slicing()
    with chopgrad.patch(vae) as handle:
        seen = []
        decoder = vae.decode.decoder
        groups = decoder.frame_groups
        decoder.frame_groups = lambda n: seen.append(n) or groups(n)
        assert relative_error(gradient(vae, z), slope) < TOLERANCE
        assert len(seen) == 3
        handle.remove()
    vae.disable_slicing()
    assert relative_error(gradient(vae, z), slope) < TOLERANCE


def test_a_truncating_strategy_truncates():
    vae = build("wan2.1")
    z = latents_for(vae, 5).requires_grad_()
    (expected,) = torch.autograd.grad(clip_loss(PairwiseAdjoint.of(vae, z, Chop(1))), z)
    with chopgrad.patch(vae, Chop(1)):
        assert relative_error(gradient(vae, z), expected) < TOLERANCE
    assert relative_error(gradient(vae, z), expected) > 0.01


def test_remove_is_idempotent_and_leaves_nothing():
    vae = build("wan2.1")
    vae.decode(latents_for(vae, 1))  # upstream leaves its counters
    before = dict(vars(vae))
    handle = chopgrad.patch(vae)
    frames = vae.decode(latents_for(vae, 3).requires_grad_()).sample
    handle.remove()
    handle.remove()
    assert vars(vae).keys() == before.keys()
    assert vae.decode.__func__ is AutoencoderKLWan.decode
    frames.sum().backward()  # what was decoded before is differentiated as it was asked for
    second = chopgrad.patch(vae, Chop(1))
    handle.remove()  # the first handle does not take off the second patch
    assert "decode" in vars(vae)
    second.remove()
    assert vars(vae).keys() == before.keys()


def test_context_manager_also_after_an_error():
    vae = build("wan2.1")
    with pytest.raises(RuntimeError, match="the user's own"), chopgrad.patch(vae) as handle:
        assert isinstance(handle, chopgrad.PatchHandle)
        assert "decode" in vars(vae)
        raise RuntimeError("the user's own")
    assert "decode" not in vars(vae)
    with chopgrad.patch(vae), pytest.raises(ValueError, match="latents have 3 channels"):
        vae.decode(torch.zeros(1, 3, 2, 2, 2, dtype=torch.float64))
    assert "decode" not in vars(vae)


def test_what_is_refused_leaves_the_vae_as_it_was():
    vae = build("wan2.1")
    with chopgrad.patch(vae), pytest.raises(ValueError, match=r"patched already: call remove\(\)"):
        chopgrad.patch(vae, Chop(1))
    with pytest.raises(TypeError, match="decode hands out frames"):
        chopgrad.patch(vae, Sampled(1))
    with pytest.raises(TypeError, match=r"strategy must be .*got 'exact'"):
        chopgrad.patch(vae, "exact")
    with pytest.raises(ValueError, match="checkpoint must be"):
        chopgrad.patch(vae, checkpoint="piece")
    with pytest.raises(ValueError, match="No causal decoder is known for Linear"):
        chopgrad.patch(nn.Linear(1, 1))
    assert "decode" not in vars(vae)


def test_settings_are_those_of_decoder_for():
    vae = build("wan2.1")
    z = 20 * latents_for(vae, 3)
    assert vae.decode(z).sample.abs().max() == 1
    with chopgrad.patch(vae, clamp=False, checkpoint="residual", check=False):
        assert vae.decode(z).sample.abs().max() > 1


@pytest.mark.parametrize("strategy", [Exact(offload=True, pieces=True), Exact(offload=False), Full()], ids=str)
def test_a_copy_decodes_with_its_own_weights(strategy):
    vae = build("wan2.1")
    z = latents_for(vae, 3).requires_grad_()
    handle = chopgrad.patch(vae, strategy)
    other = copy.deepcopy(vae)
    other.decoder.requires_grad_(True)
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(2)
    mine = vae.decode(z).sample.detach()
    handle.remove()
    frames = other.decode(z).sample
    assert not torch.allclose(frames, mine)
    clip_loss(frames).backward()
    got = [z.grad, *(p.grad for p in other.decoder.parameters())]
    assert all(p.grad is None for p in vae.parameters())
    del other.__dict__["decode"]
    (expected,) = torch.autograd.grad(clip_loss(other.decode(z).sample), z)
    assert relative_error(got[0], expected) < TOLERANCE
    assert all(g is not None for g in got)


def test_forward_of_the_vae_is_differentiable_too():
    torch.manual_seed(0)
    vae = build("wan2.1")
    frames = torch.randn(1, 3, 5, 4, 4, dtype=torch.float64, requires_grad=True)

    def run():
        (out,) = vae(frames, return_dict=False)
        return out, torch.autograd.grad(clip_loss(out), frames)[0]

    expected, slope = run()
    with chopgrad.patch(vae, Exact(offload=False)):
        out, got = run()
    torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert relative_error(got, slope) < TOLERANCE


@pytest.mark.parametrize("name", VAES)
def test_decoder_for_takes_a_patched_vae(name):
    vae = build(name)
    z = latents_for(vae, 4)
    expected = vae.decode(z).sample
    with chopgrad.patch(vae):
        decoder = chopgrad.decoder_for(vae)
        torch.testing.assert_close(decoder.decode(z), expected, rtol=TOLERANCE, atol=TOLERANCE)
        loss = chopgrad.frame_loss(decoder, z, lambda at: expected[:, :, at], F.mse_loss)
    assert loss < 1e-20


@pytest.mark.parametrize("outside", [True, False])
def test_a_peft_model(outside):
    peft = pytest.importorskip("peft")
    vae = build("wan2.1")
    config = peft.LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(vae, config).double()
    z = latents_for(vae, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    decoder_weights = {id(p) for p in model.get_base_model().decoder.parameters()}
    assert any(id(p) in decoder_weights for p in trained)

    def gradients():
        return torch.autograd.grad(clip_loss(model.decode(z).sample), trained, allow_unused=True)

    expected = gradients()
    with chopgrad.patch(model if outside else model.get_base_model()):
        assert "decode" in vars(model.get_base_model())
        got = gradients()
    assert "decode" not in vars(model.get_base_model())
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or relative_error(x, y) < TOLERANCE


class Pipeline:
    """What diffusers' Wan pipeline does after its last step."""

    def __init__(self, vae):
        self.vae = vae

    def __call__(self, latents):
        config = self.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
        std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(latents)
        latents = latents.to(self.vae.dtype) / std + mean
        video = self.vae.decode(latents, return_dict=False)[0]
        return (video / 2 + 0.5).clamp(0, 1)


def test_a_pipeline_and_a_guidance_loop_change_by_one_line():
    pipe = Pipeline(build("wan2.1"))

    def guide():
        latents = latents_for(pipe.vae, 4)
        for _ in range(3):
            latents = latents.detach().requires_grad_()
            video = pipe(latents)
            (slope,) = torch.autograd.grad((video[:, :, 0] - video[:, :, -1]).square().mean(), latents)
            latents = latents - slope / slope.norm()
        return latents.detach()

    expected = guide()
    with chopgrad.patch(pipe.vae):
        got = guide()
    assert relative_error(got, expected) < 1e-10
    assert relative_error(latents_for(pipe.vae, 4), expected) > 0.01


def test_weights_that_are_replaced_meanwhile_are_used():
    """``load_state_dict`` and ``to`` work on a patched VAE."""
    vae, other = build("wan2.1"), build("wan2.1", seed=5)
    z = latents_for(vae, 3)
    with chopgrad.patch(vae):
        vae.load_state_dict(other.state_dict())
        torch.testing.assert_close(vae.decode(z).sample, other.decode(z).sample, rtol=TOLERANCE, atol=TOLERANCE)
        assert vae.float().decode(z.float()).sample.dtype == torch.float32


def test_a_patched_vae_survives_pickling(tmp_path):
    vae = build("wan2.1")
    z = latents_for(vae, 3).requires_grad_()
    chopgrad.patch(vae)
    torch.save(vae, tmp_path / "vae.pt")
    other = torch.load(tmp_path / "vae.pt", weights_only=False)  # what this test has just written
    assert other.decode.decoder.vae is other
    assert torch.equal(other.decode(z).sample, vae.decode(z).sample)
    with pytest.raises(ValueError, match="patched already"):
        chopgrad.patch(other)


def test_removal_brings_back_a_compiled_decode():
    vae = build("wan2.1")
    vae.decode = compiled = torch.compile(vae.decode, backend="eager")
    with chopgrad.patch(vae):
        assert vae.decode is not compiled
    assert vae.decode is compiled


def test_what_is_no_vae():
    with pytest.raises(TypeError, match="vae must be a diffusers model, got NoneType"):
        chopgrad.patch(None)
