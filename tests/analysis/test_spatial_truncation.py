"""Truncation in space: its definition against plain back-propagation and the library, tiles, costs and verdicts."""

import warnings

import pytest
import torch
from PIL import Image

import chopgrad
from analysis import spatial_truncation
from analysis.real_clips import Crops
from analysis.space import cost
from analysis.space.claims import claims, summarise
from analysis.space.cost import Operations, cost_claims, operations, strategies
from analysis.space.cut import CutDecode, TiledDecode, bounds, errors, share_at_cuts
from chopgrad import Chop, Exact, Full
from suite.records import read_record
from tests.models import build

ROWS = 5


def setting(name):
    decoder = chopgrad.decoder_for(build(name))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, decoder.latent_channels, 3, ROWS, 3, generator=generator, dtype=torch.float64)
    frames = decoder.decode(latents)
    return decoder, latents, torch.randn(frames.shape, generator=generator, dtype=torch.float64)


def gradient(decoder, latents, adjoint, strategy):
    leaf = latents.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = chopgrad.decode(decoder, leaf, strategy)
    return torch.autograd.grad(frames, leaf, adjoint)[0]


def test_bounds():
    assert bounds(5, 2) == [(0, 2), (2, 5)]
    assert bounds(16, 4) == [(0, 4), (4, 8), (8, 12), (12, 16)]


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_the_definition_is_the_librarys(name):
    decoder, latents, adjoint = setting(name)
    cut = CutDecode(decoder, latents)
    assert (cut.frames - decoder.decode(latents)).abs().max() < 1e-12
    exact = gradient(decoder, latents, adjoint, Full())
    assert errors(cut.gradient(adjoint), exact)["relative_error"] < 1e-12
    found = []
    for space in (0, 1, ROWS):
        strategy = Chop(0, block=3, recompute=True, pieces=True, strips=2, space=space)
        here = cut.gradient(adjoint, 2, space)
        assert errors(gradient(decoder, latents, adjoint, strategy), here)["relative_error"] < 1e-11
        found.append(errors(here, exact)["relative_error"])
    assert found[0] > found[1] > 0.01
    assert found[2] < 1e-12  # nothing is so far away
    assert errors(cut.gradient(adjoint), exact)["relative_error"] < 1e-12  # and what was cut is whole again


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_tiles_are_another_model_until_they_overlap_wholly(name):
    decoder, latents, adjoint = setting(name)
    frames, exact = decoder.decode(latents), gradient(decoder, latents, adjoint, Full())
    apart, over = (TiledDecode(decoder, latents, 2, space) for space in (0, ROWS))
    assert (apart.frames - frames).norm() > 1e-3 * frames.norm()
    assert (over.frames - frames).abs().max() < 1e-12
    assert errors(over.gradient(adjoint), exact)["relative_error"] < 1e-12
    top = gradient(decoder, latents[..., :2, :], adjoint[..., : 2 * adjoint.shape[-2] // ROWS, :], Full())
    assert torch.equal(apart.gradient(adjoint)[..., :2, :], top)


def test_errors_and_where_they_lie():
    exact = torch.zeros(1, 1, 1, 8, 1)
    exact[..., 0, :] = 3.0
    found = exact.clone()
    found[..., 4, :], found[..., 7, :] = 4.0, 2.0
    assert errors(2 * exact, exact) == {"relative_error": 1.0, "cosine": 1.0}
    assert errors(found, exact)["relative_error"] == pytest.approx(20**0.5 / 3)
    assert share_at_cuts(found, exact, 2) == pytest.approx(0.8)  # rows 3 and 4
    assert share_at_cuts(exact, exact, 2) == 0


def test_operations_are_counted_inside_of_sweeps():
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with Operations() as counted:
        torch.autograd.grad((x @ weight.T).sum(), [x, weight])
    assert counted.count == 3 * 2 * 2 * 3 * 4  # forward, and a product of the same size for each gradient
    vae = str(cost.EMBEDDED["wan2.1"])
    full, pieces = (operations(vae, 5, 16, 16, s) for s in (Full(), Exact(pieces=True)))
    assert 1.5 * full < pieces < 2.1 * full  # two more forward passes, and no gradient of the weights in either


def sample(clip, truncated, tiled, near=0.95):
    gradients = [
        {"residual": residual, "loss": loss, "strips": 2, "space": space,
         "truncated": {"relative_error": truncated / 4**space, "cosine": 0.9, "share_at_cuts": near},
         "tiled": {"relative_error": tiled / 4**space, "cosine": 0.8}}
        for residual, loss in (("film", "mse"), ("random", None), ("own", "mse")) for space in (0, 1, 2)
    ]  # fmt: skip
    tiles = [
        {"residual": residual, "strips": 2, "space": space, "psnr_db": 30.0 + space, "relative_error": 0.1}
        for residual in ("film", "own") for space in (0, 1, 2)
    ]  # fmt: skip
    floor, control = {"film": 20.0, "own": 30.0}, {"error_at_full_height": 1e-7}
    return {"clip": clip, "latent_rows": 16, "gradients": gradients, "tiles": tiles, "floor_psnr_db": floor,
            "control": control}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "verdicts"),
    [
        ([(0.8, 1.0, 0.95), (0.4, 0.5, 0.92)], ["holds", "holds", "holds"]),
        ([(2.4, 1.0, 0.5), (2.0, 1.5, 0.6)], ["fails", "fails", "fails"]),
        ([(2.4, 2.5, 0.95), (0.8, 0.7, 0.85)], ["undecided", "undecided", "undecided"]),
    ],
)
def test_verdicts(values, verdicts):
    summary = summarise([sample(f"c{k}", *v) for k, v in enumerate(values)])
    found = claims("x", summary)
    assert [c.verdict for c in found] == verdicts
    assert [c.source for c in found] == ["Sec. 3.3", "ours", "ours"]
    assert "cut 2 latent rows beyond strips of 8" in found[0].statement
    assert "film 20.0 dB, own 30.0 dB" in found[0].evidence
    assert "frames 32.0 and 32.0 dB" in found[1].evidence
    assert "(spread evenly 0.12)" in found[2].evidence
    assert summary["control"] == {"error_at_full_height": 1e-7}


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "holds"), (0.5, "fails")])
def test_a_saving_would_be_told(share, verdict):
    exact = {"device_bytes": 2**30, "host_bytes": 2**31, "operations": 100}
    rows = [{"name": name, **exact} for name in strategies(3, 4, full=True)]
    rows[-1]["host_bytes"] = int(share * 2**31)
    metrics = {"costs": rows, "cpu_seconds": {row["name"]: [1.0, 2.0] for row in rows[:-1]}}
    settings = {"architecture": "wan2.1", "frames": 17, "height": 480, "width": 832, "strips": 4}
    (claim,) = cost_claims(settings, metrics)
    assert claim.verdict == verdict
    assert f"cut at k=2 and D=1: device 1.00, host {share:.2f}" in claim.evidence
    assert "exact strips take 1.00 GiB, host 2.0 GiB" in claim.evidence


def test_the_script_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(spatial_truncation.Config, "crops", lambda self, _: Crops(None, 1, 5, (16, 16)))
    monkeypatch.setattr(cost, "ROUNDS", 1)
    config = spatial_truncation.Config(vaes=("wan2.1",), out=tmp_path)
    spatial_truncation.main(config)
    record = read_record(tmp_path / "spatial_truncation-wan2.1.json")
    (measured,) = record.metrics["samples"]
    assert max(measured["control"].values()) < 1e-5
    assert {(g["residual"], g["loss"], g["space"]) for g in measured["gradients"]} == {
        (residual, loss, space)
        for residual, loss in (("film", "mse"), ("own", "mse"), ("random", None))
        for space in config.spaces
    }
    costs = read_record(tmp_path / "spatial_truncation-cost.json").metrics["costs"]
    assert [row["name"] for row in costs] == list(strategies(2, 2, full=False))
    assert all(row["device_bytes"] > 0 and row["operations"] > 0 for row in costs)
    with Image.open(tmp_path / "spatial_truncation.png") as picture:
        assert min(picture.size) > 400
