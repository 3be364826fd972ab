"""Random estimators of the gradient: unbiased and of the stated variance, by enumeration of every draw."""

import itertools

import pytest
import torch

from suite import random_truncation as rt
from suite.pairwise import truncated

T = 5


@pytest.fixture(scope="module")
def pairs():
    """Random pairwise gradients that decay with distance, zero against causality."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(T, T, 2, 3, generator=generator, dtype=torch.float64)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    return values * ((i >= j) * 0.6 ** (i - j).clamp(min=0))[:, :, None, None]


def probabilities(survival):
    """P(R = d) from P(R >= d)."""
    return survival - torch.cat([survival[1:], survival.new_zeros(1)])


SURVIVALS = [torch.tensor([1, 0.7, 0.5, 0.2, 0.1]).double(), rt.geometric(1.5, T), torch.ones(T).double()]


def test_terms_sum_to_the_gradient_and_its_truncations(pairs):
    terms = rt.distance_terms(pairs)
    for distance in range(T):
        expected = truncated(pairs, distance)
        assert torch.allclose(terms[: distance + 1].sum(0), expected, rtol=1e-12)
        assert torch.allclose(rt.loss_terms(pairs, distance).sum(0), expected, rtol=1e-12)
        # A loss gives nothing farther back than the distance.
        assert not rt.loss_terms(pairs, distance)[4, : 4 - distance].any()


@pytest.mark.parametrize("survival", SURVIVALS)
def test_randomised_truncation_by_enumeration(pairs, survival):
    terms, full = rt.distance_terms(pairs), pairs.sum(0)
    draws = [rt.randomised(terms, survival, r) for r in range(T)]
    chances = probabilities(survival)
    assert chances.sum() == pytest.approx(1)
    mean = sum(p * x for p, x in zip(chances, draws, strict=True))
    assert torch.allclose(mean, full, rtol=1e-12, atol=1e-14)
    variance = sum(p * (x - full).square().sum() for p, x in zip(chances, draws, strict=True)).item()
    assert rt.randomised_variance(rt.gram(terms), survival) == pytest.approx(variance, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_artbp_by_enumeration(pairs, keep):
    """Unbiased, and at the latents of the same squared error as a geometric distance of the same c."""
    full = pairs.sum(0)
    mean, variance = torch.zeros_like(full), 0.0
    for cuts in itertools.product([False, True], repeat=T - 1):
        chance = keep ** (T - 1 - sum(cuts)) * (1 - keep) ** sum(cuts)
        draw = rt.artbp(pairs, cuts, keep)
        mean += chance * draw
        variance += chance * (draw - full).square().sum().item()
    assert torch.allclose(mean, full, rtol=1e-12, atol=1e-14)
    survival = torch.tensor([keep**d for d in range(T)], dtype=torch.float64)
    assert rt.randomised_variance(rt.gram(rt.distance_terms(pairs)), survival) == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("count", range(1, T + 1))
def test_sampled_losses_by_enumeration(pairs, count):
    terms = rt.loss_terms(pairs, 1)
    own = terms.sum(0)
    draws = [T / count * terms[list(c)].sum(0) for c in itertools.combinations(range(T), count)]
    assert torch.allclose(torch.stack(draws).mean(0), own, rtol=1e-12, atol=1e-14)
    variance = torch.stack([(x - own).square().sum() for x in draws]).mean().item()
    assert rt.sampled_variance(rt.gram(terms), count) == pytest.approx(variance, rel=1e-10, abs=1e-12)


def test_geometric_has_the_mean_asked_for():
    for mean in (0.2, 1.0, 3.0):
        survival = rt.geometric(mean, T)
        assert survival[0] == 1
        assert survival[1:].sum().item() == pytest.approx(mean, rel=1e-9)
        assert torch.allclose(survival[1:] / survival[:-1], survival[1].expand(T - 1))
    assert torch.allclose(rt.geometric(T - 1, T), torch.ones(T, dtype=torch.float64))


def test_the_best_distribution_is_best(pairs):
    """No other distribution of the same mean has less variance, least of all a random small change of it."""
    generator = torch.Generator().manual_seed(1)
    for products in (rt.gram(rt.distance_terms(pairs)), rt.gram(torch.randn(T, 9, generator=generator).double())):
        for mean in (0.5, 1.0, 2.5):
            best = rt.best_survival(products, mean)
            assert best[0] == 1 and (best[1:] <= best[:-1] + 1e-12).all()
            assert best[1:].sum().item() == pytest.approx(mean, rel=1e-6)
            least = rt.randomised_variance(products, best)
            assert least <= rt.randomised_variance(products, rt.geometric(mean, T)) * (1 + 1e-9)
            for _ in range(200):
                change = 0.02 * torch.randn(T - 1, generator=generator, dtype=torch.float64)
                other = (best[1:] + change - change.mean()).clamp(1e-6, 1)
                if (other[1:] > other[:-1]).any() or abs(other.sum() - mean) > 1e-9:
                    continue
                other = torch.cat([best[:1], other])
                assert least <= rt.randomised_variance(products, other) + 1e-9


def test_bad_settings():
    for make in (lambda m: rt.geometric(m, T), lambda m: rt.best_survival(torch.eye(T).double(), m)):
        for mean in (0.0, T - 0.5):
            with pytest.raises(ValueError, match=f"above 0 and at most {T - 1}, got {mean}"):
                make(mean)
    with pytest.raises(ValueError, match=f"count must be between 1 and {T}, got 0"):
        rt.sampled_variance(torch.eye(T), 0)
