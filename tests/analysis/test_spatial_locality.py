"""Spatial locality: shares of energy against a decoder whose reach in space is known."""

import pytest
import torch

import chopgrad
from analysis import spatial_locality
from analysis.spatial_locality import claims, energy_by_distance, even_share, summarise, within
from tests.models import build


def test_energy_of_a_decoder_with_one_cell_of_reach():
    """Pixels that see their own latent cell with weight 1 and its right neighbour with weight 0.5."""

    class Shifted(chopgrad.CausalDecoder):
        latent_channels = 1

        def frame_groups(self, latent_frames):
            return [chopgrad.FrameGroup(slice(i, i + 1), slice(i, i + 1)) for i in range(latent_frames)]

        def step(self, z, state):
            x = z + 0.5 * torch.roll(z, -1, dims=-1)
            return x.repeat_interleave(8, -1).repeat_interleave(8, -2), None

        def denormalize(self, latents):
            return latents

        normalize = denormalize

    shares = energy_by_distance(Shifted(torch.nn.Module()), torch.randn(1, 1, 2, 7, 9, dtype=torch.float64), probes=3)
    assert shares == pytest.approx([0.8, 0.2, 0, 0, 0])
    assert within(shares, 0) == pytest.approx(0.8)
    assert within(shares, 1) == pytest.approx(1.0)


def test_shares_of_a_real_architecture_add_up():
    decoder = chopgrad.decoder_for(build("wan2.1"))
    shares = energy_by_distance(decoder, torch.randn(1, 4, 3, 6, 6, dtype=torch.float64), probes=2)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == 4
    assert all(s > 0 for s in shares)
    with pytest.raises(ValueError, match="one probe"):
        energy_by_distance(decoder, torch.randn(1, 4, 3, 6, 6, dtype=torch.float64), probes=0)


def test_even_share_counts_cells():
    assert even_share((16, 16), 4) == 81 / 256
    assert even_share((4, 4), 1) == 9 / 16
    assert even_share((4, 4), 9) == 1
    assert even_share((5, 3), 1) == 9 / 15


def samples(*values):
    """Two samples with the share at distances 0 to 5 given for the first cells, the rest farthest away."""
    rows = [[v, *[0.0] * 4, 1 - v] for v in values]
    return [{"clip": f"c{k}", "crop": 0, "latent_size": [12, 12], "energy_share": r} for k, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("values", "verdict"), [((0.999, 0.995), "holds"), ((0.9, 0.91), "fails"), ((0.999, 0.98), "undecided")]
)
def test_verdicts(values, verdict):
    (claim,) = claims("x", summarise(samples(*values)), summarise(samples(0.4, 0.5)))
    assert claim.verdict == verdict
    assert claim.source == "Fig. 7"
    assert f"{sum(values) / 2:.4f} [" in claim.evidence
    assert spatial_locality.HALO == 4
