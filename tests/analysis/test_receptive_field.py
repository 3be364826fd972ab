"""The receptive field of decoders: found by gradients, predicted from the architecture, and exact at D = R."""

import pytest
import torch

import chopgrad
from analysis.bounds.toys import TOYS, finite_memory
from analysis.receptive_field import (
    claims,
    latents_for_groups,
    library_difference,
    predicted_receptive_field,
    reach,
    receptive_field,
    untrained,
)
from tests.models import VAES, build


@pytest.mark.parametrize("name", VAES)
def test_the_prediction_is_what_gradients_show(name):
    decoder = chopgrad.decoder_for(build(name))
    predicted = predicted_receptive_field(decoder)
    sizes = reach(decoder, latents_for_groups(decoder, predicted + 3))
    assert receptive_field(sizes) == predicted
    assert all(x > 0 for x in sizes[: predicted + 1])
    assert not any(sizes[predicted + 1 :])
    assert receptive_field(reach(decoder, latents_for_groups(decoder, predicted + 1))) is None  # too short to tell


def test_toys_have_the_receptive_field_that_they_were_built_with():
    assert receptive_field(reach(finite_memory(2, layers=3, taps=3), 12)) == 6
    assert receptive_field(reach(TOYS["rotating"].build(), 12)) is None


def test_the_library_is_exact_at_the_receptive_field_and_not_before():
    toy = finite_memory(2, layers=2, taps=3)
    assert library_difference(toy, 4, 10) < 1e-15
    assert library_difference(toy, 3, 10) > 1e-3
    decoder = chopgrad.decoder_for(build("cogvideox"))
    found = predicted_receptive_field(decoder)
    assert library_difference(decoder, found, latents_for_groups(decoder, found + 2)) < 1e-14


def test_untrained_is_the_same_architecture_with_other_weights():
    vae = build("wan2.1")
    other = untrained(vae)
    assert other.config == vae.config
    assert other.dtype == torch.float64
    pairs = list(zip(vae.parameters(), other.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert torch.equal(next(untrained(vae).parameters()), next(other.parameters()))  # seeded


ROW = {"decoder": "x", "receptive_field_groups": 4, "receptive_field_frames": 17, "predicted_groups": 4}
ROW |= {"searched_groups": 44, "library_relative_difference_at_R": 0.0}


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ({}, ["holds", "holds"]),
        ({"predicted_groups": 5}, ["holds", "fails"]),
        ({"library_relative_difference_at_R": 1e-9}, ["fails", "holds"]),
        ({"receptive_field_groups": None}, ["undecided", "undecided"]),
    ],
)
def test_verdicts(change, verdicts):
    assert [c.verdict for c in claims([ROW | change])] == verdicts
