"""What only a GPU can show. Skipped by name where there is none."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.memory import PeakMemory, available_bytes
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STRATEGIES = [
    Full(),
    Exact(),
    Exact(offload=True),
    Exact(offload=True, pieces=True),
    Exact(offload=True, every=2, pieces=True),
    Chop(1),
    Chop(1, block=2, recompute=True, offload=True, pieces=True),
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


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["frame", "residual", "block"])
def test_recomputing_inside_a_group_agrees_with_the_cpu(mode, offload):
    results = []
    for device in ("cpu", "cuda"):
        vae = build("wan2.1")
        leaf = latents_for(vae, 5).to(device).requires_grad_()
        decoder = chopgrad.decoder_for(vae.to(device), checkpoint=mode)
        target = torch.zeros_like(decoder.decode(leaf.detach()))
        chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, Exact(offload=offload, pieces=offload)).backward()
        results.append(leaf.grad.cpu())
    assert relative_error(results[1], results[0]) < 1e-11


def test_an_error_in_the_loss_leaves_no_copy_under_way():
    vae = build("wan2.1", torch.float32).to("cuda")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 6, size=16).cuda().requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))

    def fails(frames, part):
        if part.shape[2] > 1:
            raise RuntimeError("the user's own error")
        return F.mse_loss(frames, part)

    for _ in range(20):
        with pytest.raises(RuntimeError, match="the user's own error"):
            chopgrad.frame_loss(decoder, z, target, fails, Exact(offload=True, pieces=True))
        x = torch.full((2**22,), 7.0, device="cuda")  # takes the memory that was given back
        assert (x == 7).all()


def test_what_a_call_leaves_in_the_pinned_cache_is_free_for_the_next():
    vae = build("wan2.1", torch.float32).cuda()
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 8, size=32).cuda().requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    free = []
    for _ in range(3):
        chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True)).backward()
        torch.cuda.synchronize()
        free.append(available_bytes("cpu"))
    stats = torch.cuda.host_memory_stats()
    assert stats["allocated_bytes.current"] > stats["active_bytes.current"]
    assert free[2] > free[0] - 2**28  # other processes come and go


def test_peak_memory_is_that_of_the_allocator():
    with PeakMemory("cuda") as memory:
        a = torch.zeros(2**22, device="cuda")
        del a
        b = torch.zeros(2**20, device="cuda")
    assert memory.peak_bytes == 2**24
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with PeakMemory("cuda") as memory:
        (torch.randn(512, 512, device="cuda") @ torch.randn(512, 512, device="cuda")).sum().item()
    assert memory.peak_bytes == torch.cuda.max_memory_allocated() - before
    del b
