"""What residuals decide of the bias: the measured cases against the library's own gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from analysis import residuals
from analysis.residuals import KINDS, NOISE, blurred, claims, summarise
from chopgrad import Chop
from suite.clips import seeded_crop
from suite.records import read_record
from suite.vaes import load_vae
from tests.analysis.test_gradient_bias import folder  # noqa: F401


@pytest.fixture(scope="module")
def record(folder, tmp_path_factory):  # noqa: F811
    """Of a small random VAE and two clips of noise."""
    out = tmp_path_factory.mktemp("residuals")

    class Small(residuals.Config):
        @property
        def crops(self):
            return residuals.Crops(folder / "clips", 1, 9, (16, 16))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.real_clips.HELD_OUT_CLIPS", ())
        residuals.main(Small(vaes=(str(folder / "vae"),), out=out))
    return read_record(out / "residuals-vae.json")


def test_the_record_has_every_residual(record):
    assert list(record.metrics["summary"]) == list(KINDS)
    assert {s["clip"] for s in record.metrics["samples"]} == {"a.mkv", "b.mkv"}
    assert (record.path.parent / "residuals.png").stat().st_size > 10_000
    for kind, found in record.metrics["summary"].items():
        assert list(found["errors"]) == (["adjoint"] if kind == "random" else ["mse"])
        assert found["errors"]["adjoint" if kind == "random" else "mse"][-1]["relative_error"][2] < 1e-4
    assert record.metrics["summary"]["film"]["floor_share"] == [1, 1, 1]
    assert record.metrics["summary"]["noisy, own"]["floor_share"] == [0, 0, 0]
    assert len(record.metrics["claims"]) == len(KINDS) + 1


def test_errors_are_those_of_the_library(record, folder):  # noqa: F811
    vae = load_vae(str(folder / "vae"))
    decoder, video = chopgrad.decoder_for(vae), seeded_crop(folder / "clips" / "a.mkv", 0, 9, (16, 16), 0)[0]
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()
        own, of_blurred = decoder.decode(z), vae.encode(blurred(video)).latent_dist.mode()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    cases = {"film": (z, video), "blurred, film": (of_blurred, video), "blurred, own": (of_blurred, own)}
    cases["noisy, own"] = z + NOISE * z.std() * noise, own
    (sample,) = (s for s in record.metrics["samples"] if s["clip"] == "a.mkv")
    for kind, (latents, target) in cases.items():
        leaf = latents.clone().requires_grad_()
        frames = vae.decode(leaf).sample
        (full,) = torch.autograd.grad(F.mse_loss(frames, target), leaf)
        (cut,) = torch.autograd.grad(chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, Chop(1)), leaf)
        found = sample["residuals"][kind]
        assert found["errors"]["mse"][1]["relative_error"] == pytest.approx(
            ((cut - full).norm() / full.norm()).item(), rel=1e-3
        )
        assert found["psnr_db"] == pytest.approx(10 * math.log10(4 / F.mse_loss(frames, target).item()), abs=1e-3)


def test_a_blur_keeps_what_is_even_and_the_mean():
    video = torch.rand(1, 3, 2, 24, 20)
    assert torch.allclose(blurred(torch.full_like(video, 0.3)), torch.tensor(0.3))
    assert blurred(video).shape == video.shape
    spot = torch.zeros(1, 3, 1, 31, 31)
    spot[..., 15, 15] = 1
    rows = blurred(spot)[0, 0, 0].sum(1)
    assert rows.sum() == pytest.approx(1, abs=1e-5)
    spread = (rows * (torch.arange(31) - 15.0) ** 2).sum().sqrt()
    assert spread == pytest.approx(residuals.BLUR, rel=0.05)


def sample(clip, of_film, of_own):
    def rows(error):
        return [
            {"relative_error": e, "cosine": 1 - e / 2, "best_scaled_error": e} for e in (2 * error, error, error / 2)
        ]

    found = {kind: {"errors": {"mse": rows(of_own)}, "psnr_db": 25.0, "floor_share": 0.5} for kind in KINDS[:-1]}
    found["film"]["errors"]["mse"] = rows(of_film)
    found["random"] = {"errors": {"adjoint": rows(of_own)}}
    return {"clip": clip, "residuals": found}


@pytest.mark.parametrize(("of_film", "verdict"), [(0.4, "holds"), (0.1, "fails")])
def test_verdicts_follow_from_the_numbers(of_film, verdict):
    found = claims("wan2.1", summarise([sample("a", of_film, 0.08), sample("b", of_film, 0.08)]))
    assert found[-1].verdict == verdict
    cosine = {c.statement: c.verdict for c in found[:-1]}
    assert [v for s, v in cosine.items() if "noisy, own" in s] == ["holds"]
    assert [v for s, v in cosine.items() if "residual film" in s] == ["fails" if of_film > 0.1 else "undecided"]
