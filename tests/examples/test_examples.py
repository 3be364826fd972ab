"""The examples run as a reader runs them, learn something, and stay short enough to be read at a glance."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import chopgrad
from suite.vaes import EMBEDDED
from tests.models import build, latents_for

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL_VIDEO = ("--frames", "9", "--size", "16", "16")


@pytest.fixture
def run(capsys, monkeypatch, fresh_accelerate):
    """``python examples/NAME.py ARGUMENTS``, here: numbers printed, by the word before them, step by step."""

    def command_line(name, *arguments):
        path, before = str(ROOT / "examples" / f"{name}.py"), torch.get_rng_state()
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        torch.set_rng_state(before)
        printed = capsys.readouterr().out
        return numbers(printed), printed

    return command_line


def numbers(text):
    steps = [dict(re.findall(r"(\w+) (-?\d\S*)", line)) for line in text.splitlines() if "step" in line]
    return [{word: float(value) for word, value in step.items()} for step in steps]


def example(name):
    """The module, for its functions."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ran(capsys):
    """Numbers printed by an example's ``main`` in this process, step by step."""

    def main(name, **arguments):
        before = torch.get_rng_state()
        example(name).main(**{"frames": 9, "size": (16, 16), "device": "cpu"} | arguments)
        torch.set_rng_state(before)
        return numbers(capsys.readouterr().out)

    return main


def relative_error(found, expected):
    return max((a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))


def test_a_pixel_loss_trains_a_transformer(run):
    steps, text = run("pixel_loss", *SMALL_VIDEO, "--steps", "24")
    latent, pixel = ([float(x) for x in re.findall(rf"{kind} loss (\S+)", text)] for kind in ("latent", "pixel"))
    assert len(latent) == len(pixel) == len(steps) == 24
    assert median(latent[-8:]) < 0.9 * median(latent[:8])
    # The prediction is off by sigma times the transformer's error; where sigma is small the VAE's own error is left.
    scaled = [loss / step["sigma"] ** 2 for loss, step in zip(pixel, steps) if step["sigma"] > 0.5]
    assert median(scaled[-4:]) < 0.5 * scaled[0]
    _, without = run("pixel_loss", *SMALL_VIDEO, "--steps", "3", "--pixel-weight", "0")
    first, *later = [step.group() for step in re.finditer("step.*", without)]
    assert first in text
    assert later
    assert not any(step in text for step in later)  # the pixel loss's gradient made another transformer


def test_a_reward_is_raised(run):
    steps, _ = run("reward_gradient", "--latent-frames", "3", "--latent-size", "4", "4", "--steps", "8")
    rewards = [step["reward"] for step in steps]
    assert len(rewards) == 8
    assert min(rewards[-3:]) > max(rewards[:3])


@pytest.mark.parametrize("arguments", [{}, {"loss": "lpips"}, {"distance": 0}], ids=["mse", "lpips", "mse-truncated"])
def test_a_decoder_is_fine_tuned(ran, tmp_path, arguments):
    steps = ran("decoder_finetuning", size=(32, 32), steps=4, save=tmp_path, **arguments)
    losses = [step[arguments.get("loss", "mse")] for step in steps]
    assert len(losses) == 4
    assert losses[-1] < 0.95 * losses[0]
    before, after = (AutoencoderKLWan.from_pretrained(folder).state_dict() for folder in (EMBEDDED["wan2.1"], tmp_path))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}


def test_a_whole_vae_is_trained(ran, tmp_path):
    steps = ran("vae_training", size=(32, 32), steps=5, save=tmp_path)
    losses = [step["reconstruction"] for step in steps]
    assert len(losses) == 5
    assert losses[-1] < 0.98 * losses[0]
    assert all(step["kl"] > 0 for step in steps)
    before, after = (AutoencoderKLWan.from_pretrained(folder).state_dict() for folder in (EMBEDDED["wan2.1"], tmp_path))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name.split(".")[0] for name in moved} == {"encoder", "quant_conv", "decoder", "post_quant_conv"}
    (perceptual,) = ran("vae_training", size=(32, 32), steps=1, lpips_weight=1.0)
    assert perceptual["reconstruction"] > losses[0]


def test_a_reward_of_the_whole_clip_is_raised_on_a_pipeline(ran):
    rewards = [step["reward"] for step in ran("pipeline_reward", sampling_steps=2)]
    assert len(rewards) == 10
    assert min(rewards[-3:]) > max(rewards[:3]) + 0.2


def test_a_patched_pipeline_has_the_plain_gradient(pipeline):
    module = example("pipeline_reward")
    torch.manual_seed(0)
    vae = build("wan2.1")
    vae.register_to_config(scale_factor_spatial=2, scale_factor_temporal=2)
    pipe = WanPipeline.from_pretrained(pipeline, vae=vae, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    encoder = module.VideoEncoder().double().eval().requires_grad_(False)
    wanted = torch.randn(1, 64, dtype=torch.float64)

    with_graph = []
    pipe.transformer.register_forward_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))

    def gradient():
        torch.manual_seed(1)
        video = module.sample(pipe, 3, 9, (16, 16))
        assert video.shape == (1, 3, 9, 16, 16)
        reward = F.cosine_similarity(encoder(video), wanted).mean()
        gradients = torch.autograd.grad(reward, list(pipe.transformer.parameters()))
        return [torch.cat([g.flatten() for g in gradients])]

    plain = gradient()
    assert with_graph == [False, False, True]
    assert torch.is_grad_enabled()
    with chopgrad.patch(vae):
        assert relative_error(gradient(), plain) < 1e-6  # the pipeline rounds latents to float32
    with chopgrad.patch(vae, chopgrad.Chop(0)):
        assert relative_error(gradient(), plain) > 1e-2


def test_a_decoder_and_a_discriminator_train_against_each_other(ran):
    steps = ran("gan_step", lr=3e-4, steps=6)
    assert len(steps) == 6
    assert steps[-1]["hinge"] < steps[0]["hinge"] - 1e-3
    assert steps[-1]["l1"] < 0.9 * steps[0]["l1"]
    assert all(step["weight"] > 0 and step["penalty"] > 0 for step in steps)
    (rare,) = ran("gan_step", lr=3e-4, steps=1, adversarial_weight=0.2)
    assert rare["l1"] == steps[0]["l1"]
    assert rare["weight"] == pytest.approx(2 * steps[0]["weight"], rel=1e-3)


def test_the_generator_step_has_the_plain_gradient():
    module = example("gan_step")
    vae = build("wan2.1").requires_grad_(True)
    decoder = chopgrad.decoder_for(vae)
    latents = latents_for(vae, 4, size=4)
    torch.manual_seed(0)
    discriminator = module.temporal_discriminator(8).double()
    pixels = torch.rand(1, 3, 7, 8, 8, dtype=torch.float64) * 2 - 1

    def step(frames):
        losses = F.l1_loss(frames, pixels), -discriminator(frames).mean()
        weight = module.adaptive_weight(*losses, vae.decoder.conv_out.weight)
        trained = [*decoder.parameters(), *discriminator.parameters()]
        return [weight, *torch.autograd.grad(losses[0] + weight * losses[1], trained)]

    plain = step(vae.decode(latents).sample)
    assert plain[0] > 0
    assert relative_error(step(chopgrad.decode(decoder, latents)), plain) < 1e-9
    assert relative_error(step(chopgrad.decode(decoder, latents, chopgrad.Chop(0))), plain) > 1e-2


def test_the_r1_penalty_is_that_of_real_frames():
    """For a linear discriminator: half of R1 times the squared norm of its weight, and nothing for the decoder."""
    module = example("gan_step")
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 4, 1, dtype=torch.float64))
    real, fake = torch.randn(2, 2, 3, 2, 2, 2, dtype=torch.float64)
    hinge, penalty = module.discriminator_loss(linear, real, fake.requires_grad_(), r1=3.0)
    torch.testing.assert_close(penalty, 1.5 * linear[1].weight.square().sum())
    expected = F.relu(1 - linear(real)).mean() + F.relu(1 + linear(fake)).mean()
    torch.testing.assert_close(hinge, expected)
    (hinge + penalty).backward()
    assert fake.grad is None
    assert linear[1].weight.grad is not None


def test_latents_are_guided_while_they_are_sampled(ran):
    guided = [step["distance"] for step in ran("guidance", steps=8)]
    alone = [step["distance"] for step in ran("guidance", steps=8, strength=0.0)]
    assert guided[0] == alone[0]
    assert guided[-1] < 0.3 * guided[0]
    assert alone[-1] > 0.9 * alone[0]


def test_guidance_has_the_plain_gradient():
    module = example("guidance")
    vae = build("wan2.1")
    latents = latents_for(vae, 4, size=4).requires_grad_()
    guide = torch.randn(1, 3, 2, 1, 1, dtype=torch.float64)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])

    def gradient():
        frames = module.decoded(vae, latents)
        loss = F.mse_loss(module.guide_of(frames), guide)
        return frames.detach(), torch.autograd.grad(loss, latents)[0]

    plain = gradient()
    with chopgrad.patch(vae):
        assert relative_error(gradient(), plain) < 1e-6  # the loss is taken in float32
    with chopgrad.patch(vae, chopgrad.Chop(0)):
        assert relative_error(gradient(), plain) > 1e-2
    expected = vae.decode(chopgrad.decoder_for(vae).denormalize(latents.detach())).sample
    torch.testing.assert_close(plain[0], expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pixel_loss", ("--frames", "5", "--size", "8", "8", "--steps", "1")),
        ("reward_gradient", ("--latent-frames", "2", "--latent-size", "4", "4", "--steps", "1")),
        ("decoder_finetuning", ("--frames", "5", "--size", "8", "8", "--steps", "1", "--subfolder", "vae")),
    ],
)
def test_the_published_layout_is_taken(run, pipeline, name, arguments):
    steps, _ = run(name, "--pretrained", str(pipeline), *arguments)
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pipeline_reward", {"sampling_steps": 2}),
        ("gan_step", {"subfolder": "vae"}),
        ("guidance", {"size": (8, 8)}),
    ],
)
def test_the_published_layout_is_taken_here(ran, pipeline, name, arguments):
    assert len(ran(name, pretrained=str(pipeline), steps=1, **arguments)) == 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder with small widths, without a text encoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    small = build("wan2.1", torch.float32)  # two pixels a latent
    small.register_to_config(scale_factor_spatial=2, scale_factor_temporal=2)
    transformer = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=32,
        ffn_dim=32, num_layers=1,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")  # as published
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=small, transformer=transformer, scheduler=scheduler)
    pipe.save_pretrained(folder)
    return folder


def test_a_decoder_is_taught_from_outside(run, monkeypatch):
    monkeypatch.setattr(chopgrad.decoders, "DECODERS", before := dict(chopgrad.DECODERS))
    _, text = run("own_decoder")
    assert "MyVAE" in before
    assert "holds: forward, " in text
    assert "latents without a gradient: 0" in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80


def test_every_example_is_tested():
    """Here, but for ``check_a_decoder``, whose output is in the docs."""
    assert {path.stem for path in EXAMPLES} == {
        "check_a_decoder", "decoder_finetuning", "gan_step", "guidance", "own_decoder", "pipeline_reward",
        "pixel_loss", "reward_gradient", "vae_training",
    }  # fmt: skip
