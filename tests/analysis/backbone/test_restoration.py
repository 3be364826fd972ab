"""The small restoration task: its clips, its backbone, and gradients that agree with ordinary training."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from analysis.backbone import restoration
from analysis.backbone import samples as samples_module
from analysis.backbone.coordinates import sampled_coordinates
from analysis.backbone.restoration import Restoration, join_groups
from analysis.backbone.task_settings import TaskSettings
from bench.tasks.data.pairs import ClipShape, Pairs, from_bytes
from bench.tasks.deblurring import Deblurring
from bench.tasks.training.restorer import Restorer, fresh_backbone
from chopgrad import Chop, Full
from suite.pairwise import truncated
from tests.models import build

pytestmark = pytest.mark.usefixtures("small_films")
FILMS = samples_module.training_films()
SETTINGS = TaskSettings(frames=9, size=16, width=32, layers=1, warm_up_steps=3, warm_up_clips=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restoration")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return Restoration(dataclasses.replace(SETTINGS, vae=str(folder / "vae")))


@pytest.fixture(scope="module")
def samples(task, small_films):
    return task.samples(4, seed=1)


@pytest.fixture(scope="module")
def backbone(task):
    backbone = task.new_backbone(0)
    generator = torch.Generator().manual_seed(0)
    for p in backbone.backbone.proj_out.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return backbone


def test_clips_of_the_training_diet(task, samples):
    assert [film.name for film in FILMS] == ["bigbuckbunny.mp4", "bikes.mp4"]
    (film,) = (film.name for film in samples_module.training_films())
    assert samples.sources == ["generated 1000", film, "generated 1002", film]
    assert task.samples(2, seed=1, films=FILMS).sources == ["bigbuckbunny.mp4", "bikes.mp4"]
    assert samples.clean.shape == (4, 3, 9, 16, 16)
    assert samples.condition.shape == samples.latents.shape == (4, 4, 5, 8, 8)
    assert samples.clean.abs().max() <= 1
    again, other = task.samples(4, seed=1), task.samples(4, seed=2)
    assert torch.equal(again.clean, samples.clean) and torch.equal(again.condition, samples.condition)
    assert not torch.equal(other.clean[1], samples.clean[1])
    assert task.samples(3, seed=1, films=[]).sources == ["generated 1000", "generated 1001", "generated 1002"]
    part = samples[2:]
    assert part.sources == samples.sources[2:] and torch.equal(part.condition, samples.condition[2:])


def test_latents_are_normalised(task, samples):
    with torch.no_grad():
        encoded = task.vae.encode(samples.clean[:1]).latent_dist.mode()
    assert torch.allclose(task.decoder.denormalize(samples.latents[:1]), encoded, atol=1e-4)


def test_clips_and_model_are_those_of_the_end_task(task, samples, backbone):
    """What the theory measures is what ``bench.tasks`` trains."""
    deblurring = Deblurring(films=samples_module.training_films(), mixed=True)
    pairs = Pairs(deblurring, task.decoder, "", [1_001], ClipShape(9, 16, 16), None)[0]
    assert torch.equal(samples.clean[1], from_bytes(pairs["target"]))
    assert torch.equal(samples.condition[1], pairs["condition_latents"])
    trained = Restorer(fresh_backbone("wan", 4, (5, 8, 8), 32, 1, seed=0))
    trained.load_state_dict(backbone.state_dict())
    assert torch.equal(task.predict(backbone, samples.condition), trained(samples.condition))


def test_a_new_backbone_returns_its_condition(task, samples):
    restored = task.restore(task.new_backbone(0), samples.condition)
    assert torch.allclose(restored, task.decoder.denormalize(samples.condition))


def test_the_pixel_loss_is_that_of_each_clip(task, samples, backbone):
    losses = task.pixel_loss(backbone, samples)
    with torch.no_grad():
        decoded = task.vae.decode(task.restore(backbone, samples.condition[2:3])).sample
    assert losses[2] == pytest.approx(F.mse_loss(decoded, samples.clean[2:3]).item(), rel=1e-4)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("strategy", [Full(), Chop(0), Chop(1), Chop(1, block=2)])
def test_parameter_gradients_are_those_of_training(task, samples, backbone, strategy):
    """One decode and masked pairs give, for each clip of a batch, what frame_loss back-propagates."""
    pairs = task.latent_pairs(backbone, samples[:2], F.mse_loss)
    distance, block = (5, 1) if strategy == Full() else (strategy.distance, strategy.block)
    for k in range(2):
        one = samples[k : k + 1]
        (got,) = task.parameter_gradients(backbone, one.condition, truncated(pairs[k], distance, block)[None])
        backbone.zero_grad()
        loss = chopgrad.frame_loss(task.decoder, task.restore(backbone, one.condition), one.clean, F.mse_loss, strategy)
        loss.backward()
        expected = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in backbone.parameters()]
        )
        assert expected.norm() > 0
        assert ((got - expected).norm() / expected.norm()).item() < 1e-4
    backbone.zero_grad()


def test_half_precision_is_that_of_the_vae_alone(folder, task, samples, backbone):
    half = Restoration(dataclasses.replace(task.settings, dtype="bfloat16"))
    same = half.samples(4, seed=1)
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in (same.clean, same.condition, same.latents)} == {torch.float32}
    assert half.restore(backbone, same.condition).dtype == torch.bfloat16
    losses = task.pixel_loss(backbone, samples), half.pixel_loss(backbone, samples)
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    found = []
    for one in (task, half):
        pairs = one.latent_pairs(backbone, samples[:1], F.mse_loss)
        assert pairs.dtype == torch.float32
        found.append(one.parameter_gradients(backbone, samples.condition[:1], pairs[0].sum(0)[None]))
    assert 0 < (found[1] - found[0]).norm() < 0.1 * found[0].norm()


def test_some_coordinates_are_those_of_the_whole_gradient(task, samples, backbone):
    pairs = task.latent_pairs(backbone, samples[:1], F.mse_loss)
    kept = sampled_coordinates(list(backbone.parameters()), 500, seed=3)
    whole, some = (
        task.parameter_gradients(backbone, samples.condition[:1], pairs[0].sum(0)[None], k) for k in (None, kept)
    )
    starts = torch.tensor([0, *(p.numel() for p in backbone.parameters())]).cumsum(0)
    places = torch.cat([p + start for p, start in zip(kept.places, starts[:-1], strict=True)])
    assert torch.equal(some, whole[:, places]) and some.norm() > 0


def test_frozen_parameters_are_left_out(task, samples):
    backbone = task.new_backbone(0).requires_grad_(False)
    backbone.backbone.proj_out.requires_grad_(True)
    found = task.parameter_gradients(backbone, samples.condition[:1], torch.ones(2, 5, 4, 1, 8, 8))
    assert found.shape == (2, sum(p.numel() for p in backbone.backbone.proj_out.parameters()))


def test_groups_of_several_latents_are_joined(task):
    groups = chopgrad.decoder_for(build("cogvideox")).frame_groups(5)
    parts = torch.arange(2 * 3.0).reshape(2, 1, 3, 1, 1)
    assert join_groups(parts, groups).flatten().tolist() == [0, 1, 2, 3, 4]  # 3 latents, then 2


def test_the_warm_up_learns_and_is_read_back(task, samples, tmp_path, monkeypatch):
    longer = Restoration(dataclasses.replace(task.settings, warm_up_steps=60, warm_up_rate=3e-3))
    backbone = longer.warmed_up("a", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def error(one):
        restored = longer.restore(one, samples.condition)
        return F.mse_loss(longer.decoder.normalize(restored), samples.latents).item()

    assert error(backbone) < 0.9 * error(longer.new_backbone(0))
    monkeypatch.setattr(Restoration, "samples", lambda *a, **k: pytest.fail("trained again"))
    again = longer.warmed_up("a", cache=tmp_path)
    for p, q in zip(backbone.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("change", ["weights", "settings", "seed"])
def test_another_backbone_is_not_read_back(task, tmp_path, change):
    task.warmed_up("a", cache=tmp_path)
    if change == "weights":
        task.warmed_up("b", cache=tmp_path)
    elif change == "seed":
        task.warmed_up("a", seed=1, cache=tmp_path)
    else:
        Restoration(dataclasses.replace(task.settings, noise=0.1)).warmed_up("a", cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 0}, "frames and shrink of at least 1, a size of at least 16"),
        ({"size": 8}, "frames and shrink of at least 1, a size of at least 16"),
        ({"noise": -0.1}, "blur and noise of at least 0"),
        ({"width": 48}, "multiple of 32 and layers at least 1, got 48 and 1"),
        ({"frames": 8}, "8 frames fit no number of latents of this VAE: pass 7 or 9"),
        ({"vae": "nowhere-at-all"}, "No VAE could be loaded"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got float16"),
        ({"device": "gpu"}, "No VAE could be loaded from .* device"),
        ({"subfolder": "decoder"}, "has no config.json"),
        ({"size": 17}, "17x17 pixels come back from this VAE as 16x16: pass --size 16"),
    ],
)
def test_bad_settings(task, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Restoration(dataclasses.replace(task.settings, **changes))


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1001, 0), (1, -1), (1, 2**32 // 1000)])
def test_clips_that_would_be_those_of_another_seed(task, count, seed):
    with pytest.raises(ValueError, match="Pass 1 to 1000 clips and a seed from 0 to 4294966, got"):
        task.samples(count, seed)


def test_a_change_of_the_clips_code_makes_another_backbone(task, tmp_path, monkeypatch):
    task.warmed_up("a", cache=tmp_path)
    monkeypatch.setattr(restoration, "clips_code", lambda: "other")
    task.warmed_up("a", cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_with_cogvideox_the_backbone_is_of_its_family(tmp_path):
    build("cogvideox", torch.float32).save_pretrained(tmp_path / "vae")
    task = Restoration(dataclasses.replace(SETTINGS, vae=str(tmp_path / "vae"), size=32))
    samples, backbone = task.samples(2, seed=1, films=[]), task.new_backbone(0)
    assert backbone.family == "cogvideox"
    assert torch.allclose(task.predict(backbone, samples.condition), backbone.keep * samples.condition)
    assert 0 < backbone.keep < 1
    pairs = task.latent_pairs(backbone, samples[:1], F.mse_loss)
    for p in backbone.backbone.proj_out.parameters():
        torch.nn.init.normal_(p)
    (got,) = task.parameter_gradients(backbone, samples.condition[:1], pairs[0].sum(0)[None])
    assert got.norm() > 0


def test_films_that_are_too_short(task):
    long = Restoration(dataclasses.replace(task.settings, frames=301))
    with pytest.raises(ValueError, match=r"'carphone_pristine.mp4' has \d+ frames, but 301 are needed"):
        long.samples(2, seed=0)
