"""The gradient-bias measurement on a small random VAE: right numbers, resumed runs, and clear refusals."""

import json

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import chopgrad
from analysis import gradient_bias
from chopgrad import Chop
from suite.records import read_record
from suite.vaes import load_vae
from tests.models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE in vae/ and two videos of noise in clips/."""
    folder = tmp_path_factory.mktemp("bias")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    (folder / "clips").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        with av.open(str(folder / "clips" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.width, stream.height, stream.pix_fmt = 24, 24, "bgr0"
            for _ in range(11):
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="bgr0")))
            container.mux(stream.encode())
    return folder


def config(folder, out, **changes):
    settings = {"vae": str(folder / "vae"), "clips": folder / "clips", "crops": 2, "frames": 9, "size": (8, 8)}
    settings |= {"losses": ("mse", "l1"), "blocks": (1, 2), "device": "cpu", "dtype": "float64", "out": out}
    return gradient_bias.Config(**(settings | changes))


@pytest.fixture(scope="module")
def record(folder):
    gradient_bias.main(config(folder, folder / "whole.json"))
    return read_record(folder / "whole.json")


def test_the_record_describes_itself(record, folder):
    assert record.settings["vae"] == "vae"
    assert record.settings["clips"] == ["a.mkv", "b.mkv"]
    assert record.settings["groups"] == 5
    assert record.settings["distances"] == [0, 1, 2, 3, 4]
    assert record.provenance["torch"] == torch.__version__
    assert str(folder) not in json.dumps(record.settings | record.provenance)
    assert len(record.metrics["samples"]) == 4
    assert len(record.metrics["summary"]) == 2 * 2 * 5
    assert (folder / "whole.png").stat().st_size > 10_000
    assert "| mse" in (folder / "whole.md").read_text()


def test_the_numbers_are_those_of_the_library(record, folder):
    settings = config(folder, None)
    sample = record.metrics["samples"][1]
    video, start = gradient_bias._crop(folder / "clips" / "a.mkv", 1, settings)
    assert (sample["clip"], sample["crop"], sample["first_frame"]) == ("a.mkv", 1, start)
    vae = load_vae(settings.vae, dtype=torch.float64)
    decoder = chopgrad.decoder_for(vae)
    video = video.double()
    leaf = vae.encode(video).latent_dist.mode().requires_grad_()
    for loss, loss_fn in (("mse", F.mse_loss), ("l1", F.l1_loss)):
        (full,) = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, video), leaf)
        for block, distance in ((1, 0), (1, 1), (2, 0), (2, 1)):
            (chopped,) = torch.autograd.grad(
                chopgrad.frame_loss(decoder, leaf, video, loss_fn, Chop(distance, block)), leaf
            )
            scale = (chopped * full).sum() / chopped.square().sum()
            errors = sample["errors"][loss][str(block)][distance]
            expected = {
                "absolute_error": (chopped - full).norm(),
                "relative_error": (chopped - full).norm() / full.norm(),
                "cosine": F.cosine_similarity(chopped.flatten(), full.flatten(), dim=0),
                "best_scaled_error": (scale * chopped - full).norm() / full.norm(),
            }
            for name, value in expected.items():
                assert errors[name] == pytest.approx(value.item(), rel=1e-6), (loss, block, distance, name)


def test_the_largest_distance_is_exact(record):
    exact = [row for row in record.metrics["summary"] if row["distance"] == 4]
    assert all(row["relative_error"][2] < 1e-12 for row in exact)
    assert all(row["relative_error"][0] > 0.1 for row in record.metrics["summary"] if row["distance"] == 0)


def test_an_interrupted_run_goes_on(record, folder, monkeypatch):
    measure_one, calls = gradient_bias._measure_one, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_one(*args, **kwargs)

    monkeypatch.setattr(gradient_bias, "_measure_one", interrupted)
    settings = config(folder, folder / "resumed.json")
    with pytest.raises(KeyboardInterrupt):
        gradient_bias.measure(settings)
    assert len(read_record(settings.out).metrics["samples"]) == 2
    gradient_bias.measure(settings)
    assert len(calls) == 3 + 2  # the two finished samples were kept
    assert read_record(settings.out).metrics == record.metrics


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 8}, "8 frames fit no number of latents of this VAE: pass 7 or 9"),
        ({"frames": 41}, "'a.mkv' has 11 frames, but 41 are needed"),
        ({"distances": (-1, 0)}, "Distances must be at least 0"),
        ({"blocks": (0,)}, "blocks at least 1"),
        ({"losses": ("psnr",)}, "Unknown loss 'psnr'"),
        ({"vae": "nowhere-at-all"}, "No VAE could be loaded"),
    ],
)
def test_bad_settings(folder, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        gradient_bias.measure(config(folder, tmp_path / "x.json", **changes))
    assert not list(tmp_path.iterdir())
