"""What only a GPU can show. Skipped by name where there is none."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from bench.cases import Case
from bench.subject import Subject
from chopgrad import Chop, Exact, Full, offload
from chopgrad.memory import PeakMemory, available_bytes
from chopgrad.offload import pinned_bytes
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STRATEGIES = [
    Full(),
    Exact(offload=False),
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
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
    loss.backward()
    # What tensors asked for: the blocks that they lie in may be larger, as chance will have it. The latents' gradient
    # has as many frames as the video, and in a decoder this small it counts.
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - leaf.nbytes if device == "cuda" else None
    return loss.item(), leaf.grad.cpu(), peak


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_cuda_agrees_with_the_cpu(name, strategy):
    here, there = gradient(name, "cpu", strategy), gradient(name, "cuda", strategy)
    assert abs(here[0] - there[0]) < 1e-12 * abs(here[0])
    assert relative_error(there[1], here[1]) < 1e-11


@pytest.mark.parametrize(
    "strategy",
    [
        Exact(offload=True, pieces=True, every=1, strips=2),
        Exact(offload=True, pieces=True, every=2, strips=4),
        Chop(1, recompute=True, pieces=True, strips=3),
        Chop(1, block=2, recompute=True, pieces=True, offload=True, strips=2),
        Exact(),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox"])
def test_strips_and_the_automatic_form_agree_with_the_cpu(name, strategy):
    here, there = (gradient(name, device, strategy, size=6) for device in ("cpu", "cuda"))
    assert abs(here[0] - there[0]) < 1e-12 * abs(here[0])
    assert relative_error(there[1], here[1]) < 1e-11


TOO_LITTLE_GIB = 1.5
"""For the full graph of ``published``, which takes less than 3 GiB (on an H200)."""


@pytest.fixture
def published():
    """Two groups of the published Wan 2.1 in bfloat16, with random weights, and a way to allow less of the card."""
    subject = Subject(Case("full:wan2.1", 5, 240, 416, Full(), "mse", "bfloat16", "cuda"))
    total = torch.cuda.get_device_properties(0).total_memory

    def allow(gib):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + gib * 2**30) / total))

    yield subject, allow
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "strategy",
    [
        Exact(),
        Exact(offload=True, pieces=True, every=1, strips="auto"),
        Chop(1, recompute=True, pieces=True, offload=True, strips="auto"),
    ],
    ids=str,
)
def test_a_small_share_of_the_card_is_kept_to(published, strategy):
    subject, allow = published
    _, expected = subject.run(Full())
    allow(TOO_LITTLE_GIB)
    assert available_bytes("cuda") < 1.2 * TOO_LITTLE_GIB * 2**30
    with pytest.raises(torch.OutOfMemoryError):
        subject.run(Full())
    _, found = subject.run(strategy)
    assert relative_error(found.float(), expected.float()) < 0.05


def test_running_out_of_memory_in_spite_of_the_prediction_goes_on_with_less(published, monkeypatch, caplog):
    """As the allocator raises it, inside a sweep with copies under way."""
    subject, allow = published
    _, expected = subject.run(Full())
    allow(TOO_LITTLE_GIB)
    monkeypatch.setattr("chopgrad.automatic.available_bytes", lambda device: 2**37)
    _, found = subject.run(Exact())
    assert relative_error(found.float(), expected.float()) < 0.05
    assert "out of memory, in spite of the prediction" in caplog.text
    assert pinned_bytes() == 0


@pytest.mark.parametrize(
    "strategy",
    [Chop(0), Chop(1), Chop(1, recompute=True), Exact(offload=True), Exact(offload=True, pieces=True)],
    ids=str,
)
@pytest.mark.parametrize("name", VAES)
def test_device_memory_does_not_depend_on_the_number_of_frames(name, strategy):
    short, long = (gradient(name, "cuda", strategy, n, 16, torch.float32)[2] for n in (12, 24))
    assert long <= 1.02 * short


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


@pytest.fixture
def video():
    vae = build("wan2.1", torch.float32).cuda()
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 8, size=32).cuda().requires_grad_()
    return decoder, z, torch.zeros_like(decoder.decode(z.detach()))


def test_what_a_call_leaves_in_the_pinned_cache_is_free_for_the_next(video):
    decoder, z, target = video
    free = []
    for _ in range(3):
        chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True)).backward()
        torch.cuda.synchronize()
        free.append(available_bytes("cpu"))
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] > 0
    assert pinned_bytes() == 0
    assert free[2] > free[0] - 2**28  # other processes come and go


def test_the_same_every_is_chosen_at_each_call(video, monkeypatch, caplog):
    """What PyTorch 2.11 counts as pinned and in use grows with every call."""
    decoder, z, target = video
    monkeypatch.setattr("chopgrad.memory.available_bytes", lambda device: memory_of_six_states(decoder, z))
    with caplog.at_level("INFO", "chopgrad"):
        for _ in range(5):
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True)).backward()
    assert [record.args[0] for record in caplog.records] == [2] * 5


def memory_of_six_states(decoder, z):
    from chopgrad.memory import _kept_pinned_bytes

    with torch.no_grad():
        _, state = decoder.step(z[:, :, :1], decoder.initial_state())
        _, state = decoder.step(z[:, :, 1:2], state)
    kept, allocated = _kept_pinned_bytes(), torch.cuda.host_memory_stats()["allocated_bytes.current"]
    assert 0 <= kept <= allocated
    return 2 * 6 * sum(x.nbytes for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    "strategy", [Exact(offload=True, every=1), Exact(offload=True, pieces=True), Chop(1, offload=True)], ids=str
)
def test_reserved_memory_does_not_grow_with_the_number_of_calls(video, strategy):
    """A stream of its own for each call would make the allocator keep memory for each of 32 streams."""
    decoder, z, target = video
    reserved = []
    for _ in range(40):
        chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).backward()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[2] + 2**21


def test_side_streams_hold_no_memory_of_their_own(video):
    decoder, z, target = video
    torch.cuda.empty_cache()
    chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True, pieces=True, every=1)).backward()
    torch.cuda.synchronize()
    side = {stream.cuda_stream for stream in offload._streams(z.device)}
    assert not [s for s in torch.cuda.memory_snapshot() if s["stream"] in side and s["total_size"]]


def test_saved_tensors_of_the_host_come_back_to_the_host():
    """A step may save a CPU tensor in its graph: a table that it looks into, say."""
    buffer = offload.OffloadBuffer(torch.device("cuda", 0), True)
    saved = offload.SavedOnHost(buffer, [])
    here, there = torch.randn(3, requires_grad=True), torch.randn(3, device="cuda", requires_grad=True)
    with buffer:
        with saved.hooks():
            out = here.exp().sum().cuda() + there.exp().sin().sum()
        found = torch.autograd.grad(out, [here, there])
    assert [x.device.type for x in found] == ["cpu", "cuda"]
    assert torch.allclose(found[0], here.detach().exp())
    assert torch.allclose(found[1], there.detach().exp().cos() * there.detach().exp())


def test_large_tensors_survive_the_way_to_the_host_and_back():
    """Many at once, both ways at the same time, while the computation overwrites freed memory."""
    buffer = offload.OffloadBuffer(torch.device("cuda", 0), True)
    with buffer:
        waiting = []
        for k in range(12):
            x = torch.arange(3 * 2**20 + 5, device="cuda", dtype=torch.float32) + k
            waiting.append(buffer.put(x))
            del x
            torch.full((3 * 2**20,), -1.0, device="cuda")
            if k % 3 == 2:
                buffer.fetch(waiting[k - 2])
                assert buffer.get(waiting[k - 2])[-1].item() == 3 * 2**20 + 4 + k - 2
        buffer.clear()
        for k, offloaded in enumerate(waiting):
            buffer.fetch(waiting[k + 1 :][:1])
            x = buffer.get(offloaded)
            assert torch.equal(x, torch.arange(3 * 2**20 + 5, device="cuda", dtype=torch.float32) + k)
    del waiting, offloaded
    assert pinned_bytes() == 0


def test_a_target_that_fills_one_pinned_buffer_again_and_again():
    vae = build("wan2.1", torch.float32).cuda()
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 8, size=16).cuda().requires_grad_()
    video = torch.rand_like(decoder.decode(z.detach()))
    there = video.cpu()
    buffer = torch.empty_like(there[:, :, :4]).pin_memory()

    def target(frames):
        part = buffer[:, :, : frames.stop - frames.start]
        part.copy_(there[:, :, frames])
        return part

    found = [chopgrad.frame_loss(decoder, z, y, F.mse_loss, Exact(offload=True)) for y in (video, target)]
    gradients = [torch.autograd.grad(loss, z)[0] for loss in found]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-6)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_peak_memory_is_that_of_the_allocator():
    torch.cuda.empty_cache()  # a block that lies there may be larger than what is asked for
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
