"""The one-step model, the arms, the objective and the order of the clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from bench.baselines import FirstLatents, differentiate
from bench.tasks import LossTerm, task_by_name
from bench.tasks.data.order import Order
from bench.tasks.data.pairs import from_bytes, to_bytes
from bench.tasks.training.arms import ARMS, CONTROLS, MEANING, Isolated, Rival, Strategic, arm_by_name, with_gradients
from bench.tasks.training.objective import Objective
from bench.tasks.training.restorer import Restorer, fresh_backbone
from bench.tasks.training.settings import TrainSettings
from bench.tasks.training.train import Training
from chopgrad import Chop, Exact, Full, decoder_for, frame_loss
from tests.models import build


@pytest.fixture(scope="module")
def decoder():
    return decoder_for(build("wan2.1"), clamp=False)


def latents_and_target(decoder, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = next(iter(decoder.parameters()))
    z = torch.randn(1, decoder.latent_channels, count, 4, 4, generator=generator).to(weights.dtype)
    with torch.no_grad():
        shape = decoder.decode(z).shape
    return z, torch.rand(shape, generator=generator).to(weights.dtype) * 2 - 1


def gradient_of(arm, decoder, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = arm.pixel_loss(decoder, z, target, F.mse_loss)
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_fresh_restorer_starts_at_its_condition(family):
    model = Restorer(fresh_backbone(family, 6, (3, 4, 4), 32, 1, seed=0), timestep=400)
    condition = torch.randn(2, 6, 3, 4, 4)
    assert torch.allclose(model(condition), model.keep * condition, atol=1e-6)


def test_the_step_is_the_one_of_each_familys_parametrisation():
    """A backbone that predicts the true velocity gives the clean sample back."""
    clean, noise = torch.randn(1, 6, 3, 4, 4), torch.randn(1, 6, 3, 4, 4)
    flow = Restorer(fresh_backbone("wan", 6, (3, 4, 4), 32, 1, 0), timestep=300)
    flow.backbone.forward = lambda *a, **k: (noise - clean,)
    assert torch.allclose(flow(0.7 * clean + 0.3 * noise), clean, atol=1e-5)

    schedule = CogVideoXDDIMScheduler()
    cog = Restorer(fresh_backbone("cogvideox", 6, (3, 4, 4), 32, 1, 0), timestep=300)
    time = torch.tensor([300])
    velocity = schedule.get_velocity(clean, noise, time)
    cog.backbone.forward = lambda *a, **k: (velocity.transpose(1, 2),)
    assert torch.allclose(cog(schedule.add_noise(clean, noise, time)), clean, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "size", "words"), [(5, 4, "6 latent channels, the VAE gives 5"), (6, 3, "patches of 2x2")]
)
def test_latents_that_do_not_fit_the_backbone(channels, size, words):
    from diffusers import WanTransformer3DModel

    backbone = WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=6, out_channels=6, text_dim=8, freq_dim=32, ffn_dim=64, num_layers=1,
        num_attention_heads=1, attention_head_dim=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        Restorer(backbone)(torch.zeros(1, channels, 3, size, size))


def test_other_backbones_timesteps_and_prompts_are_refused():
    backbone = fresh_backbone("wan", 6, (3, 4, 4), 32, 1, 0)
    with pytest.raises(ValueError, match="between 1 and 999, got 0"):
        Restorer(backbone, timestep=0)
    with pytest.raises(ValueError, match=r"\[1, tokens, 8\] for this backbone, got \[1, 2, 9\]"):
        Restorer(backbone, prompt=torch.zeros(1, 2, 9))
    with pytest.raises(ValueError, match="is a Linear: pass a WanTransformer3DModel"):
        other = nn.Linear(1, 1)
        other._no_split_modules = []
        Restorer(other)
    with pytest.raises(ValueError, match="multiple of 32 and layers at least 1, got 48, 1"):
        fresh_backbone("wan", 6, (3, 4, 4), 48, 1, 0)


def test_arms_differentiate_as_their_names_say(decoder):
    z, target = latents_and_target(decoder)
    value, exact = gradient_of(ARMS["exact"], decoder, z, target)
    full_value, full = gradient_of(ARMS["full"], decoder, z, target)
    assert torch.allclose(exact, full, atol=1e-12)
    assert torch.allclose(value, full_value)
    for name, strategy in (("chop-0", Chop(0)), ("chop-1", Chop(1)), ("block-4", Chop(1, block=4))):
        ours = gradient_of(ARMS[name], decoder, z, target)[1]
        x = z.clone().requires_grad_()
        frame_loss(decoder, x, target, F.mse_loss, strategy).backward()
        assert torch.equal(ours, x.grad)
    assert not torch.allclose(gradient_of(ARMS["chop-0"], decoder, z, target)[1], full)


def test_a_rivals_gradient_is_that_of_the_benchmark(decoder):
    z, target = latents_and_target(decoder)
    value, gradient = gradient_of(Rival(FirstLatents(2)), decoder, z, target)
    expected, (of_latents,) = differentiate(FirstLatents(2), decoder, z.clone().requires_grad_(), target, F.mse_loss)
    assert torch.allclose(value, expected)
    assert torch.allclose(gradient, of_latents)
    assert (gradient[:, :, 2:] == 0).all()
    assert (gradient[:, :, :2] != 0).any()


def test_isolated_decoding_is_one_latent_at_a_time_with_a_difference_loss(decoder):
    z, target = latents_and_target(decoder, 3)
    value, gradient = gradient_of(Isolated(0.5), decoder, z, target)
    x = z.clone().requires_grad_()
    frames = [decoder.step(x[:, :, k : k + 1], decoder.initial_state())[0] for k in range(3)]
    wanted = [target[:, :, k : k + 1] for k in (0, round((target.shape[2] - 1) / 2), target.shape[2] - 1)]
    total = sum(F.mse_loss(f, w) for f, w in zip(frames, wanted)) / 3
    for k in (1, 2):
        total = total + 0.5 * F.mse_loss(frames[k] - frames[k - 1].detach(), wanted[k] - wanted[k - 1]) / 3
    total.backward()
    assert torch.allclose(value, total.detach())
    assert torch.allclose(gradient, x.grad)


def test_arms_reach_decoder_parameters_that_train():
    decoder = decoder_for(build("wan2.1"), clamp=False)
    z, target = latents_and_target(decoder, 3)
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)
    for name in ("isolated", "first", "chop-1", "exact"):
        decoder.vae.zero_grad()
        ARMS[name].pixel_loss(decoder, z.clone().requires_grad_(), target, F.mse_loss).backward()
        assert any(p.grad is not None and p.grad.norm() > 0 for p in decoder.parameters()), name


def test_every_arm_has_a_meaning_and_unknown_ones_are_refused():
    assert set(ARMS) == set(MEANING)
    assert isinstance(arm_by_name("exact"), Strategic)
    assert arm_by_name("exact") == Strategic(Exact(offload=False))
    assert arm_by_name("full") == Strategic(Full())
    with pytest.raises(ValueError, match="Unknown arm or gradient 'chop': pass one of latent"):
        arm_by_name("chop")


def test_with_gradients_is_linear_in_what_comes_after():
    x = torch.ones(3, requires_grad=True)
    (2 * with_gradients(torch.tensor(5.0), [x], [torch.tensor([1.0, 2.0, 3.0])])).backward()
    assert torch.equal(x.grad, torch.tensor([2.0, 4.0, 6.0]))
    assert with_gradients(torch.tensor(5.0), [x], [torch.ones(3)]).item() == 5.0


@pytest.fixture
def batch(decoder):
    _, target = latents_and_target(decoder, 3)
    shape = (1, decoder.latent_channels, 3, 4, 4)
    generator = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(shape, generator=generator), "target": to_bytes(target)}, shape


def test_the_latent_arm_never_decodes(decoder, batch, monkeypatch):
    items, shape = batch
    monkeypatch.setattr(type(decoder), "step", lambda *a: pytest.fail("decoded"))
    objective = Objective(task_by_name("inpainting"), ARMS["latent"], decoder, torch.device("cpu"))
    restored = torch.zeros(shape, requires_grad=True)
    total, terms = objective(restored, items)
    assert terms == {"latent mse": pytest.approx(items["latents"].square().mean().item())}
    assert total.item() == pytest.approx(terms["latent mse"])


def test_the_objective_adds_the_tasks_terms_with_their_weights(decoder, batch):
    items, shape = batch
    task = task_by_name("driving")
    restored = torch.randn(shape, requires_grad=True)
    _, once = Objective(task, ARMS["full"], decoder, torch.device("cpu"))(restored, items)
    heavier = dataclasses.replace(task, losses=tuple(dataclasses.replace(t, weight=3.0) for t in task.losses))
    total, thrice = Objective(heavier, ARMS["full"], decoder, torch.device("cpu"))(restored, items)
    assert thrice["pixel"] == pytest.approx(3 * once["pixel"], rel=1e-5)
    assert total.item() == pytest.approx(thrice["pixel"], rel=1e-5)


def test_perceptual_losses_see_every_frame_in_turn(decoder):
    objective = Objective(task_by_name("driving"), ARMS["full"], decoder, torch.device("cpu"), stride=4)
    seen: list[int] = []

    def numbered(frames: Tensor, target: Tensor) -> Tensor:
        seen.append(int(target[0, 0, 0, 0, 0]))
        return (frames - target).mean()

    objective.pixel, objective._functions = {"lpips": 1.0}, {"lpips": numbered}
    group = torch.zeros(1, 3, 4, 2, 2)
    target = torch.arange(4.0)[None, None, :, None, None].expand(1, 3, 4, 2, 2)
    for step in range(4):
        objective._offset = step
        objective._on_frames(group, target)
        objective._on_frames(group[:, :, :1], target[:, :, :1])  # a group of one frame has one to show
    assert seen == [0, 0, 1, 0, 2, 0, 3, 0]


def test_a_loss_that_is_not_finite_is_named(decoder, batch):
    items, shape = batch
    objective = Objective(task_by_name("inpainting"), ARMS["latent"], decoder, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="latent mse loss is nan"):
        objective(torch.full(shape, float("nan"), requires_grad=True), items)


def test_the_order_covers_every_clip_once_an_epoch_and_resumes_anywhere():
    whole = list(Order(clips=10, batch=4, seed=3, start=0, stop=5))
    assert sorted(row for batch in whole for row in batch) == sorted([*range(10), *range(10)])
    assert list(Order(10, 4, 3, start=2, stop=5)) == whole[2:]
    assert list(Order(10, 4, seed=4, start=0, stop=5)) != whole
    shares = [list(Order(10, 4, 3, 0, 5, process, 2)) for process in (0, 1)]
    for batch, first, second in zip(whole, *shares):
        assert sorted(first + second) == sorted(batch)
    with pytest.raises(ValueError, match="batch of 3 clips cannot be shared by 2 processes"):
        Order(10, 3, 0, 0, 5, 0, 2)


def test_a_tuned_decoder_learns_from_targets_and_the_backbone_from_latents_alone():
    decoder = decoder_for(build("wan2.1", torch.float32), clamp=False)
    z, target = latents_and_target(decoder)
    clean = decoder.normalize(z)
    parameters = list(decoder.vae.decoder.parameters())
    for p in parameters:
        p.requires_grad_(True)
    restored = (clean + 0.3 * torch.randn_like(clean)).requires_grad_()
    batch = {"latents": clean, "target": to_bytes(target)}
    task = dataclasses.replace(task_by_name("driving"), losses=(LossTerm("mse", "pixel"),))
    total, terms = Objective(task, ARMS["latent-tuned"], decoder, torch.device("cpu"))(restored, batch)
    total.backward()
    assert set(terms) == {"latent mse", "pixel"}
    x = restored.detach().requires_grad_()
    F.mse_loss(x, clean).backward()
    assert torch.allclose(restored.grad, x.grad)
    ours = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    F.mse_loss(decoder.decode(decoder.denormalize(clean)), from_bytes(batch["target"])).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(ours, parameters, strict=True))


def test_controls_are_for_tasks_whose_decoder_trains(tmp_path):
    assert not ARMS["exact-frozen"].trains_decoder and ARMS["exact-frozen"].pixels
    for arm in CONTROLS:
        with pytest.raises(ValueError, match="is a control for tasks whose decoder trains"):
            Training(TrainSettings(task="inpainting", arm=arm, out=tmp_path))
