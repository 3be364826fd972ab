"""The toys' closed forms against automatic differentiation, brute force over the Jacobian, and the library."""

import math

import pytest
import torch

from analysis.bounds.toys import TOYS, finite_memory, normal, scalar
from analysis.locality.influence import decode_with_leaves, dense_jacobian
from chopgrad import Chop, Exact, Full, frame_loss

T = 12


def weighted_sum(frames, target):
    """A loss whose gradient at the frames is the target: adjoints can be chosen."""
    return (frames * target).sum() / frames.shape[2]


@pytest.mark.parametrize("name", TOYS)
def test_the_closed_form_is_the_jacobian(name):
    toy = TOYS[name].build()
    latents = toy.random_latents(6)
    zs, frames = decode_with_leaves(toy, latents)
    for i in range(6):
        for j in range(6):
            expected = toy.jacobian(latents, i, j)
            if j > i:
                assert not expected.any()
            else:
                torch.testing.assert_close(dense_jacobian(frames[i], zs[j]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", TOYS)
def test_what_is_said_about_each_toy(name):
    case = TOYS[name]
    toy = case.build()
    latents = toy.random_latents(T)
    norms = [torch.linalg.matrix_norm(toy.jacobian(latents, T - 1, T - 1 - d), 2).item() for d in range(T)]
    if case.alpha is not None:
        assert norms == pytest.approx([norms[0] * math.exp(-case.alpha * d) for d in range(T)], rel=1e-10)
    if case.receptive_field is not None:
        assert norms[case.receptive_field] > 0
        assert not any(norms[case.receptive_field + 1 :])
    elif case.local:
        assert 0 < norms[-1] < 0.5 * max(norms)
    else:
        assert norms == pytest.approx([1.0] * T)


def test_a_contraction_contracts():
    toy = TOYS["contraction 0.8"].build()
    latents = 3 * toy.random_latents(T)
    for d in range(T):
        assert torch.linalg.matrix_norm(toy.jacobian(latents, T - 1, T - 1 - d), 2) <= 0.8 ** (d + 1)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Chop(0), Chop(3), Chop(2, block=4, recompute=True)])
def test_the_library_runs_on_toys(name, strategy):
    toy = TOYS[name].build()
    latents = toy.random_latents(T).requires_grad_()
    with torch.no_grad():
        target = torch.randn(toy.decode(latents).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(frame_loss(toy, latents, target, weighted_sum, strategy), latents)
    reach = {Full(): T, Exact(offload=False): T}.get(strategy)
    for j in range(T):
        block = getattr(strategy, "block", 1)
        last = T if reach else (j // block + 1) * block + strategy.distance
        parts = [toy.jacobian(latents.detach(), i, j).T @ target[0, :, i, 0, 0] / T for i in range(j, min(last, T))]
        torch.testing.assert_close(gradient[0, :, j, 0, 0], sum(parts), rtol=1e-10, atol=1e-14)


def test_the_receptive_field_of_a_stack():
    toy = finite_memory(1, layers=5, taps=4)
    assert toy.receptive_field == 15
    latents = toy.random_latents(20)
    assert toy.jacobian(latents, 15, 0).item() > 0
    assert toy.jacobian(latents, 16, 0).item() == 0


def test_shapes_of_scalar_and_matrix():
    assert scalar(0.5).latent_channels == 1
    assert normal(7, 0.5).latent_channels == 7
    with pytest.raises(ValueError, match="At least one latent frame"):
        scalar(0.5).frame_groups(0)
