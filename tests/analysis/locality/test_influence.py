"""Estimators of influence against Jacobians known in closed form, and the fits of decay against known rates."""

import numpy as np
import pytest
import torch

import chopgrad
from analysis.bounds.toys import TOYS, scalar
from analysis.locality.decay import MODELS, compare, fit
from analysis.locality.influence import (
    decode_with_leaves,
    dense_jacobian,
    frobenius_norm,
    frobenius_samples,
    operator_norms,
)
from tests.models import QWEN_SLOWLY, build, latents_for

T = 6


@pytest.mark.parametrize("name", TOYS)
def test_operator_norms_of_toys(name):
    toy = TOYS[name].build()
    latents = toy.random_latents(T)
    pairs = [(i, j) for i in range(T) for j in range(i + 1)]
    found = operator_norms(toy, latents, pairs, tolerance=1e-6)
    assert set(found) == set(pairs)
    for (i, j), norm in found.items():
        exact = torch.linalg.matrix_norm(toy.jacobian(latents, i, j), 2).item()
        assert norm == pytest.approx(exact, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", TOYS)
def test_frobenius_norms_of_toys(name):
    """Unbiased, and as far from the truth as the standard error says (within four of them)."""
    toy = TOYS[name].build()
    latents = toy.random_latents(T)
    norm, error = frobenius_norm(frobenius_samples(toy, latents, [2, T - 1], probes=400))
    for row, i in enumerate((2, T - 1)):
        for j in range(T):
            exact = torch.linalg.matrix_norm(toy.jacobian(latents, i, j)).item()
            assert abs(norm[row, j] - exact) <= 4 * error[row, j] + 1e-12
    assert not norm[0, 3:].any()


def test_the_standard_error_is_one():
    """Over many seeds the estimates scatter by what each of them states."""
    toy = TOYS["contraction 0.8"].build()
    latents = toy.random_latents(3)
    found = [frobenius_norm(frobenius_samples(toy, latents, [2], probes=8, seed=s)) for s in range(200)]
    norms, errors = np.stack([n[0, :3] for n, _ in found]), np.stack([e[0, :3] for _, e in found])
    assert np.sqrt(np.square(errors).mean(0)) == pytest.approx(norms.std(0), rel=0.25)
    assert np.isnan(frobenius_norm(frobenius_samples(toy, latents, [2], probes=1))[1]).all()


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_norms_of_decoders_against_the_whole_jacobian(name):
    vae = build(name)
    decoder = chopgrad.decoder_for(vae)
    latents = latents_for(vae, 5)
    count = len(decoder.frame_groups(5))
    last = count - 1
    zs, frames = decode_with_leaves(decoder, latents)
    pairs = [(last, j) for j in range(count)]
    found = operator_norms(decoder, latents, pairs, tolerance=1e-4)
    norm, error = frobenius_norm(frobenius_samples(decoder, latents, [last], probes=64))
    for j in range(count):
        jacobian = dense_jacobian(frames[last], zs[j])
        assert found[last, j] == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-4)
        assert abs(norm[0, j] - torch.linalg.matrix_norm(jacobian).item()) <= 4.5 * error[0, j]


def test_influences_are_of_one_existing_pair():
    toy = scalar(0.5)
    latents = toy.random_latents(3)
    with pytest.raises(ValueError, match=r"one video.*\[2, 1, 3, 1, 1\]"):
        operator_norms(toy, latents.expand(2, -1, -1, -1, -1), [(0, 0)])
    with pytest.raises(ValueError, match="from 0 to 2, got \\[3\\]"):
        frobenius_samples(toy, latents, [3], 1)
    with pytest.raises(ValueError, match="j <= i"):
        operator_norms(toy, latents, [(0, 1)])
    with pytest.raises(ValueError, match="one probe"):
        frobenius_samples(toy, latents, [0], 0)


TRUE = {
    "exponential": lambda d: 3.0 * np.exp(-0.4 * d),
    "power law": lambda d: 3.0 * (1 + d) ** -1.5,
    "finite support": lambda d: 3.0 * (1 - d / 14) ** 3.0,
}


@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_recovered_and_wins(model):
    d = np.arange(12)
    rng = np.random.default_rng(0)
    curves = TRUE[model](d) * np.exp(0.05 * rng.standard_normal((8, 12)))
    result = compare(d, curves, list("aabbccdd"), resamples=100)
    assert result.winner == model
    assert result.wins[model] > 0.9
    assert result.lead(model) == 0
    found = result.fits[model]
    assert found.constant == pytest.approx(3.0, rel=0.1)
    assert found.rate == pytest.approx({"exponential": 0.4, "power law": 1.5, "finite support": 3.0}[model], rel=0.15)
    assert found(d) == pytest.approx(TRUE[model](d), rel=0.2, abs=1e-3)
    if model == "finite support":
        assert found.support == pytest.approx(14, rel=0.1)
        assert found(np.array([30.0])) == 0


def test_the_interval_of_alpha_covers_the_truth_as_often_as_it_says():
    """Clips differ in their rate, samples within a clip less; 95 % intervals over 12 clips must cover the mean rate."""
    d = np.arange(9)
    covered = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        clips = np.repeat(np.arange(12), 3)
        rates = 0.5 + 0.08 * rng.standard_normal(12)[clips] + 0.04 * rng.standard_normal(36)
        noise = 0.1 * rng.standard_normal((36, 9))
        curves = np.exp(-rates[:, None] * d + noise)
        _, low, high = compare(d, curves, clips.tolist(), resamples=0 + 1, seed=seed).alpha
        covered += low <= 0.5 <= high
    assert 0.88 * 120 <= covered <= 0.995 * 120


def test_a_fit_refuses_what_has_no_logarithm():
    with pytest.raises(ValueError, match="positive"):
        fit("exponential", [0, 1, 2], [1, 0.5, 0])
    with pytest.raises(ValueError, match="three or more"):
        fit("exponential", [0, 1], [1, 0.5])
    with pytest.raises(ValueError, match="model must be"):
        fit("gaussian", [0, 1, 2], [1, 0.5, 0.2])
