"""What is measured on a device lies on it, and what is kept of it on the CPU; shown on a stand-in for a GPU."""

import pytest
import torch
from torch.nn import functional as F

from analysis import backbone_gradient, estimators, training_bias
from analysis.backbone.published import PublishedSettings
from analysis.backbone.restoration import Restoration
from analysis.backbone.task_settings import TaskSettings
from analysis.training import gaps
from suite import cases
from tests.analysis.test_real_models import pipeline
from tests.elsewhere import DEVICE, strict
from tests.models import build

pytestmark = pytest.mark.usefixtures("small_films")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "vae"
    build("wan2.1", torch.float32).save_pretrained(folder)
    return TaskSettings(
        vae=str(folder), device=DEVICE, frames=9, size=16, width=32, layers=1, warm_up_steps=1, warm_up_clips=4
    )


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path, monkeypatch):
    """Of weights without values."""
    monkeypatch.setattr(Restoration.warmed_up, "__defaults__", (0, tmp_path / "cache"))


def test_the_stand_in_is_strict():
    here, there = torch.zeros(2, 2), torch.zeros(2, 2, device=DEVICE)
    with strict():
        for mixture in (lambda: here + there, lambda: here @ there, lambda: F.conv1d(there[None], here[None])):
            with pytest.raises(Exception, match=r"CPU|device"):
                mixture()
        assert (there[torch.tensor([1])] + 1).is_meta
        assert not there.cpu().is_meta and there.sum().item() == 1


def test_everything_is_made_on_the_device_of_the_settings(settings):
    with strict():
        task = Restoration(settings)
        samples, backbone = task.samples(2, seed=0), task.warmed_up("x")
        pairs = task.latent_pairs(backbone, samples, F.mse_loss)
        gradients = task.parameter_gradients(backbone, samples.condition[:1], pairs[0].sum(0)[None])
    tensors = [samples.clean, samples.condition, samples.latents, pairs, *backbone.parameters()]
    assert {t.device.type for t in tensors} == {task.device.type} == {DEVICE}
    assert gradients.device.type == "cpu" and gradients.shape == (1, sum(p.numel() for p in backbone.parameters()))


@pytest.mark.parametrize(
    ("script", "config"),
    [
        (backbone_gradient, {"count": 4, "resamples": 2, "blocks": (1, 2), "cases": ("training-mse",)}),
        (estimators, {"count": 4, "calls": 1, "repeats": 1, "tolerances": (0.5,), "distances": (1,)}),
        (training_bias, {"seeds": 1, "steps": 1, "toy_seeds": 1, "toy_steps": 2, "decays": (0.5,), "noises": (0.0,)}),
    ],
    ids=["backbone_gradient", "estimators", "training_bias"],
)
def test_the_scripts_mix_no_devices(settings, tmp_path, monkeypatch, script, config):
    asked = []
    real = cases.provenance
    for module in (training_bias, gaps):
        monkeypatch.setattr(module, "DISTANCES", (1, None))
    monkeypatch.setattr(cases, "provenance", lambda device="cpu": asked.append(device) or real(device))
    with strict():
        script.main(script.Config(task=settings, out=tmp_path / "out", **config))
    assert set(asked) - {"cpu"} == {DEVICE}


@pytest.mark.parametrize("options", [{"coordinates": 500}, {"lora_rank": 2, "warm_up": True}], ids=["weights", "LoRA"])
def test_a_published_transformer_mixes_no_devices(tmp_path, options):
    folder = str(pipeline(tmp_path / "p"))
    settings = TaskSettings(vae=folder, subfolder="vae", device=DEVICE, frames=9, warm_up_steps=1, warm_up_clips=4)
    published = PublishedSettings(pretrained=folder, **options)
    config = backbone_gradient.Config(
        task=settings, published=published, size=16, count=4, resamples=2, blocks=(1,), out=tmp_path / "out"
    )
    with strict():
        task = config.restoration(config.task)
        backbone = task.warmed_up("x")
        assert {t.device.type for t in (*backbone.parameters(), *backbone.buffers())} == {DEVICE}
        backbone_gradient.main(config)
