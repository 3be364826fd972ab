"""A sample of a model's coordinates: every one has the same chance, and measures of it are those of all."""

import pytest
import torch

from analysis.backbone.coordinates import sampled_coordinates
from analysis.backbone.mean_gradient import compare

TENSORS = [torch.zeros(3, 5), torch.zeros(1), torch.zeros(84), torch.zeros(2, 2)]


def test_few_coordinates_are_all_kept():
    for count in (None, 104, 1000):
        everything = sampled_coordinates(TENSORS, count)
        assert everything.places == [None] * 4 and everything.sizes == [15, 1, 84, 4]
        assert len(everything) == everything.total == 104
    gradients = [torch.arange(15.0).reshape(3, 5), None, torch.ones(84), torch.full((2, 2), 7.0, dtype=torch.bfloat16)]
    values = everything.values(TENSORS, gradients)
    assert values.tolist() == [*map(float, range(15)), 0.0, *[1.0] * 84, *[7.0] * 4]
    assert values.dtype == torch.float32


@pytest.mark.parametrize("count", [13, 26, 40])  # stretches of 8, 4 and 2.6
def test_every_coordinate_has_the_same_chance(count):
    hits = torch.zeros(104)
    starts = torch.tensor([0, 15, 16, 100])
    for seed in range(1500):
        kept = sampled_coordinates(TENSORS, count, seed)
        assert kept.sizes == [len(p) for p in kept.places] and kept.total == 104
        assert len(kept) == count or (count == 40 and len(kept) > 30)
        for places, start in zip(kept.places, starts, strict=True):
            hits[places + start] += 1
    assert sampled_coordinates(TENSORS, count, 1).places[2].tolist() != kept.places[2].tolist()
    chance = count / 104
    spread = (1500 * chance * (1 - chance)) ** 0.5
    lost = 0.1 if count == 40 else 0  # of neighbours that meet
    assert ((hits - 1500 * chance).abs() < 5 * spread + lost * 1500 * chance).all()


def test_measures_of_a_sample_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.full((n,), s) for n, s in ((40_000, 1.0), (50_000, 0.1), (10_000, 3.0))])
    full = scale * torch.randn(100_000, generator=generator)
    chopped = 0.8 * full + 0.2 * scale * torch.randn(100_000, generator=generator)
    tensors = [torch.zeros(40_000), torch.zeros(50_000), torch.zeros(10_000)]
    whole = compare(chopped[None], full[None], [40_000, 50_000, 10_000])
    kept = sampled_coordinates(tensors, 5_000)
    assert kept.sizes == pytest.approx([2000, 2500, 500], abs=1)
    some = [kept.values(tensors, x.split([40_000, 50_000, 10_000]))[None] for x in (chopped, full)]
    for name, value in compare(*some, kept.sizes).items():
        assert value.item() == pytest.approx(whole[name].item(), rel=0.05), name


def test_no_coordinates():
    with pytest.raises(ValueError, match="At least one coordinate must be kept, got 0"):
        sampled_coordinates(TENSORS, 0)
