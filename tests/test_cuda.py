"""What only a GPU can show. Skipped by name where there is none."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.memory import PeakMemory
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STRATEGIES = [
    Full(),
    Exact(),
    Exact(offload=True),
    Exact(offload=True, every=2, pieces=True),
    Chop(1),
    Chop(1, offload=True),
    Chop(1, block=2, recompute=True),
]


def gradient(name, device, strategy, latent_frames=5, size=2, dtype=torch.float64):
    vae = build(name, dtype)
    leaf = latents_for(vae, latent_frames, size=size).to(device).requires_grad_()
    decoder = chopgrad.decoder_for(vae.to(device))
    with torch.no_grad():
        target = torch.zeros_like(decoder.decode(leaf))
    with PeakMemory(device) as memory:
        loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
        loss.backward()
    return loss.item(), leaf.grad.cpu(), memory.peak_bytes


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_cuda_agrees_with_the_cpu(name, strategy):
    here, there = gradient(name, "cpu", strategy), gradient(name, "cuda", strategy)
    assert abs(here[0] - there[0]) < 1e-12 * abs(here[0])
    assert relative_error(there[1], here[1]) < 1e-11


@pytest.mark.parametrize(
    "strategy",
    [Chop(0), Chop(1), Chop(1, recompute=True), Exact(offload=True), Exact(offload=True, pieces=True)],
    ids=str,
)
@pytest.mark.parametrize("name", VAES)
def test_device_memory_does_not_depend_on_the_number_of_frames(name, strategy):
    short, long = (gradient(name, "cuda", strategy, n, 16, torch.float32)[2] for n in (12, 24))
    assert long <= 1.05 * short


def test_peak_memory_is_that_of_the_allocator():
    with PeakMemory("cuda") as memory:
        a = torch.zeros(2**22, device="cuda")
        del a
        b = torch.zeros(2**20, device="cuda")
    assert memory.peak_bytes == 2**24
    del b
