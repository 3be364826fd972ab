"""What sees the whole picture held fixed: against autograd with the statistics given, and the script."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analysis import whole_picture
from analysis.real_clips import Crops
from analysis.whole_picture import claims, held_fixed, summarise
from suite.records import read_record


def test_frames_stay_and_statistics_have_no_gradient():
    norm = nn.GroupNorm(2, 4).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = norm(x)
    with held_fixed() as called:
        y = norm(x)
        z = F.scaled_dot_product_attention(x, x, x)
    assert called == ["group_norm", "attention"]
    assert torch.allclose(y, expected) and not z.requires_grad
    assert norm(x).grad_fn is not None and F.scaled_dot_product_attention(x, x, x).requires_grad  # as before
    seed = torch.zeros_like(y)
    seed[..., 0, 0] = 1
    (fixed,), (whole,) = torch.autograd.grad(y, x, seed), torch.autograd.grad(expected, x, seed)
    assert (fixed[..., 0, 0] != 0).all() and fixed[..., 1:, :].abs().max() == 0  # nothing reaches other rows
    assert whole[..., 1:, :].abs().min() > 0


def sample(clip, whole, fixed):
    errors = {"as_it_is": {"relative_error": [0.2, whole]}, "fixed": {"relative_error": [0.1, fixed]}}
    return {"clip": clip, "latent_rows": 16, "held_fixed": ["attention", "group_norm"], **errors}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([(0.1, 0.01), (0.1, 0.02)], "holds"), ([(0.1, 0.05), (0.1, 0.04)], "fails"), ([(0.1, 0.05), (0.1, 0.01)],
                                                                                    "undecided")],
)  # fmt: skip
def test_verdicts(values, verdict):
    (claim,) = claims("x", summarise([sample(f"c{k}", *v) for k, v in enumerate(values)]), (0, 4))
    assert claim.verdict == verdict
    assert "strips of 8, fixed: attention and group norm; k=0 0.200" in claim.evidence


@pytest.mark.parametrize(("vae", "held"), [("wan2.1", ["attention"]), ("cogvideox", ["group_norm"])])
def test_the_script(tmp_path, monkeypatch, vae, held):
    monkeypatch.setattr(whole_picture.Config, "crops", lambda self, _: Crops(None, 1, 1, (16, 16)))
    whole_picture.main(whole_picture.Config(vaes=(vae,), out=tmp_path))
    (measured,) = read_record(tmp_path / f"whole_picture-{vae}.json").metrics["samples"]
    assert measured["held_fixed"] == held
    assert measured["fixed"]["relative_error"] != measured["as_it_is"]["relative_error"]
