"""The offload buffer: values survive the way to the host and back, and the device copies are let go in time."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full, engine, memory, offload
from chopgrad.graph import Graph
from chopgrad.offload import OffloadBuffer, Offloaded, SavedOnHost, part_sizes, pinned_bytes
from tests.chopgrad.test_gradient import case, compare
from tests.models import VAES, build, latents_for

OFFLOADING = [
    *(Exact(offload=True, every=k, pieces=p) for k in (None, 1, 2, 3) for p in (False, True)),
    *(Chop(d, block=w, offload=True) for d in (0, 2) for w in (1, 2)),
    *(Chop(1, block=2, recompute=True, offload=True, pieces=p) for p in (False, True)),
]


class BufferOnAnyDevice(OffloadBuffer):
    """Really copies on a CPU too, where the ordinary buffer hands tensors back as they are."""

    def __init__(self, device, enabled):
        super().__init__(device, enabled)
        self.enabled = enabled


def buffer():
    return BufferOnAnyDevice(torch.device("cpu"), True)


@pytest.fixture
def small_parts(monkeypatch):
    """Tensors of a few bytes wait in several parts, as those of many MiB do."""
    monkeypatch.setattr(offload, "SMALLEST_PART", 8)


def test_on_a_cpu_nothing_moves():
    x = torch.ones(3)
    ordinary = OffloadBuffer(torch.device("cpu"), True)
    assert ordinary.put(x) is x
    assert ordinary.get(x) is x


def test_a_tree_comes_back_as_it_was(small_parts):
    last = torch.randn(1, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d)
    tree = ("Rep", None, [torch.randn(2, 3), torch.randn(4).to(torch.bfloat16), last, torch.ones(()), torch.ones(0, 2)])
    b = buffer()
    offloaded = b.put(tree)
    assert offloaded[:2] == ("Rep", None)
    assert all(isinstance(x, Offloaded) for x in offloaded[2])
    assert len(offloaded[2][2].parts) > 2
    b.clear()
    back = b.get(b.fetch(offloaded))
    for a, b in zip(back[2], tree[2], strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert a.data_ptr() != b.data_ptr() or not a.numel()


def test_what_leaves_is_found_on_the_device_until_the_next_departure():
    b, x, y = buffer(), torch.randn(3), torch.randn(3)
    offloaded = b.put(x)
    assert b.get(offloaded) is x
    b.put(y)
    assert offloaded.on_device is None
    assert torch.equal(b.get(offloaded), x)
    assert offloaded.on_device is None  # handed over, not kept


def test_views_travel_without_the_rest_of_their_storage():
    whole = torch.randn(4, 1000)
    offloaded = buffer().put(whole[:, :2])
    assert [part.untyped_storage().nbytes() for part in offloaded.parts] == [8 * 4]
    assert offloaded.on_device.untyped_storage().nbytes() == 8 * 4


def test_what_is_on_another_device_stays_there():
    x = torch.randn(3)
    elsewhere = BufferOnAnyDevice(torch.device("meta"), True)
    assert elsewhere.put([x])[0] is x
    assert elsewhere.get(x) is x


@pytest.mark.parametrize("size", [0, 2, 100, 2**20, 2**20 + 2, 3 * 2**20, 100 * 2**20 + 6, 160 * 2**20, 5 * 2**30 + 16])
def test_little_is_lost_when_pinned_memory_is_rounded_to_powers_of_two(size):
    parts = part_sizes(size)
    assert sum(parts) == size
    assert all(part & (part - 1) == 0 for part in parts[:-1])
    assert len(parts) <= 6
    rounded = sum(1 << (part - 1).bit_length() for part in parts if part)
    assert rounded <= size + max(2**20, size / 16)


@pytest.mark.parametrize("name", VAES)
def test_every_offloading_strategy_against_brute_force(name, monkeypatch, small_parts):
    monkeypatch.setattr(engine, "OffloadBuffer", BufferOnAnyDevice)
    vae, z, target = case(name, 5)
    compare(vae, z, target, F.mse_loss, OFFLOADING)


def run(name, strategy, groups=5):
    decoder, z = chopgrad.decoder_for(build(name, torch.float32)), None
    z = latents_for(decoder.vae, groups if name != "cogvideox" else 2 * groups - 1).requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).backward()


@pytest.mark.parametrize("strategy", [s for s in OFFLOADING if s.plan().recompute], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_nothing_waits_for_nobody(name, strategy, monkeypatch):
    """What leaves for the host is asked for again: the state that leaves the last group, say, would not be."""
    put, got = [], set()

    class Watched(BufferOnAnyDevice):
        def _put(self, x):
            put.append(super()._put(x))
            return put[-1]

        def _get(self, offloaded):
            got.add(offloaded)
            return super()._get(offloaded)

    monkeypatch.setattr(engine, "OffloadBuffer", Watched)
    run(name, strategy)
    assert len(put) > 10
    assert [x.shape for x in put if x not in got] == []


@pytest.mark.parametrize("strategy", [Full(), Exact(offload=False), Exact(pieces=True), Chop(1)], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_adjoints_of_states_hold_no_more_than_themselves(name, strategy, monkeypatch):
    """They come as narrow views of the gradients of whole groups, which would be alive as long as they are."""
    pull, seen = Graph.pull, []

    def watched(self, *args, **kwargs):
        of_features, of_parameters, of_state = pull(self, *args, **kwargs)
        seen.extend(x for x in of_state if x is not None)
        return of_features, of_parameters, of_state

    monkeypatch.setattr(Graph, "pull", watched)
    run(name, strategy)
    assert len(seen) > 10
    assert all(x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes for x in seen)


def test_memory_of_the_size_of_its_storage_need_not_be_that_storage():
    """Overlaps can make up for gaps: the last frame repeated is as large as two frames."""
    whole = torch.arange(4.0).view(2, 2)
    x = whole[1:].expand(2, 2)
    assert x.untyped_storage().nbytes() == x.nbytes
    b = buffer()
    offloaded = b.put(x)
    b.clear()
    assert torch.equal(b.get(offloaded), x)
    y = whole.t()  # dense, in another order
    offloaded = b.put(y)
    b.clear()
    assert torch.equal(b.get(offloaded), y) and b.get(offloaded).stride() == y.stride()


class Flagged(torch.Tensor):
    """A subclass, which may be more than its memory."""


@pytest.mark.parametrize(
    "x", [torch.ones(3).as_subclass(Flagged), torch.eye(3).to_sparse()], ids=["subclass", "sparse"]
)
def test_what_is_more_than_its_memory_stays_as_it_is(x):
    b = buffer()
    assert b.get(b.put(x)) is x


class Rolling(chopgrad.CausalDecoder):
    """A step whose state takes a form that the real decoders' states do not: the error of one kind, in 20 lines."""

    latent_channels = 3

    def __init__(self, kind):
        super().__init__(nn.Module())
        self.kind, self.weight = kind, nn.Parameter(torch.linspace(0.5, 1.5, 3).view(1, 3, 1, 1, 1).double())

    def frame_groups(self, latent_frames):
        return [
            chopgrad.FrameGroup(slice(2 * i, 2 * i + 2), slice(2 * i, 2 * i + 2)) for i in range(latent_frames // 2)
        ]

    def parameters(self):
        yield self.weight

    def initial_state(self):
        return (None,)

    def step(self, z, state):
        (before,) = state
        x = z * self.weight
        if before is not None:
            if self.kind == "no gradient":
                before = NoGradientOfTheSecond.apply(before)
            elif self.kind == "complex":
                before = torch.view_as_real(before).sum(-1)
            x = x + before * x
        y = x.exp()
        if self.kind == "repeated":  # causal padding by the last frame
            x = y + y[:, :, -1:].expand(-1, -1, 2, -1, -1) * y
            return x, (y[:, :, -1:].expand(-1, -1, 2, -1, -1),)
        if self.kind == "complex":
            return x, (torch.complex(y, y.square()),)
        return x, (y.sin(),)

    denormalize = normalize = None


class NoGradientOfTheSecond(torch.autograd.Function):
    """Its backward returns None, as an operator that stops a gradient does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize(
    "strategy",
    [
        Exact(offload=False),
        Exact(offload=True, every=1),
        Exact(offload=True, every=2),
        Chop(9, offload=True),
        Chop(9, block=2, offload=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["repeated", "no gradient", "complex"])
def test_states_of_other_forms(kind, strategy, monkeypatch, small_parts):
    monkeypatch.setattr(engine, "OffloadBuffer", BufferOnAnyDevice)
    decoder = Rolling(kind)
    z = 0.1 * torch.randn(1, 3, 8, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target, gradients = torch.zeros_like(z), []
    leaf = z.clone().requires_grad_()
    state, plain = decoder.initial_state(), 0.0
    for group in decoder.frame_groups(8):
        frames, state = decoder.step(leaf[:, :, group.latents], state)
        plain = plain + F.mse_loss(frames, target[:, :, group.frames]) / 4
    gradients.append(torch.autograd.grad(plain, [leaf, decoder.weight]))
    leaf = z.clone().requires_grad_()
    loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
    gradients.append(torch.autograd.grad(loss, [leaf, decoder.weight]))
    assert torch.allclose(loss.double(), plain)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


# What graphs save


def saved_graph(saved, f, x):
    with saved.hooks():
        return f(x)


def test_a_tensor_that_is_saved_twice_waits_once():
    b, w = buffer(), torch.randn(8, requires_grad=True)
    puts = []
    b._put = lambda x: puts.append(x.shape) or OffloadBuffer._put(b, x)
    saved = SavedOnHost(b, [w])
    x = torch.randn(4, 8, requires_grad=True)

    def f(x):
        y = x.exp()  # saves its result
        return ((y * w).sin() + y.t().cos().t() + y[:, :3].sum()).sum()  # y again, y * w, and a view of y

    plain = torch.autograd.grad(f(x), [x, w])
    out = saved_graph(saved, f, x)
    found = torch.autograd.grad(out, [x, w])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert puts == [(4, 8), (4, 8)]  # y and y * w, and no weight


def test_a_tensor_that_changed_between_is_saved_again():
    b = buffer()
    saved = SavedOnHost(b, [])
    a, x = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)

    def f(a):
        first = a * x
        b.clear()
        x.mul_(3)
        return (first + a * x).sum()

    out = saved_graph(saved, f, a)
    assert torch.equal(torch.autograd.grad(out, a)[0], torch.full((3,), 8.0))


def test_one_copy_at_most_comes_back_ahead(monkeypatch):
    """Also where one tensor is asked for several times, and where a graph is kept for another pull."""
    b = buffer()
    saved = SavedOnHost(b, [])
    x = torch.randn(5, requires_grad=True)

    def f(x):
        y = x.sin()
        return (y.cos() * y.exp() * y.sin().cos() * x.cos()).sum()

    out = saved_graph(saved, f, x)
    b.clear()
    waiting = list(saved._places.values())
    for _ in range(3):
        torch.autograd.grad(out, x, retain_graph=True)
        assert sum(w.on_device is not None for w in {id(w): w for w in waiting}.values()) <= 1


def test_views_that_only_look_alike_are_not_taken_for_each_other():
    whole = torch.randn(4, dtype=torch.complex128)

    def f(a):
        u = a * whole
        repeated = u.real.exp()
        part = repeated.view(2, 2)[1:].expand(2, 2)
        return (u * u.conj() * u).abs().sum() + (u.imag * u.conj().imag * u.real).sum() + (part * part.sin()).sum()

    a = torch.ones(4, dtype=torch.complex128, requires_grad=True)
    (plain,) = torch.autograd.grad(f(a), a)
    (found,) = torch.autograd.grad(saved_graph(SavedOnHost(buffer(), []), f, a), a)
    assert torch.allclose(found, plain, rtol=1e-12)


@pytest.mark.parametrize("later", [False, True])
def test_a_change_in_place_after_saving_is_an_error_while_the_copy_is_under_way(later):
    """Nobody knows which values arrive. Once they have, they are those that were saved."""
    b = buffer()
    saved = SavedOnHost(b, [])
    x = torch.full((3,), 2.0)
    a = torch.ones(3, requires_grad=True)
    out = saved_graph(saved, lambda a: (a * x).sum(), a)
    if later:
        b.clear()
    x.mul_(3)
    if later:
        assert torch.equal(torch.autograd.grad(out, a)[0], torch.full((3,), 2.0))
    else:
        with pytest.raises(RuntimeError, match="changed in place after it was saved"):
            torch.autograd.grad(out, a)


def test_what_is_saved_comes_back_ahead_of_its_use():
    b, order = buffer(), []

    class Watched(SavedOnHost):
        def _unpack(self, saved):
            order.append([saved.place, {k for k, x in self._places.items() if x.on_device is not None}])
            return super()._unpack(saved)

    saved = Watched(b, [])
    x = torch.randn(5, requires_grad=True)
    out = saved_graph(saved, lambda x: x.sin().cos().sin().cos().sum(), x)
    b.clear()
    torch.autograd.grad(out, x)
    assert [place for place, _ in order] == [4, 3, 2, 1]
    assert all(place in there for place, there in order[1:])


def test_a_saved_output_does_not_keep_its_graph_alive():
    """On another device it stays where it is; with its own node in it, nobody would ever free either."""
    saved = SavedOnHost(BufferOnAnyDevice(torch.device("meta"), True), [])
    x = torch.randn(3, requires_grad=True)
    out = saved_graph(saved, lambda x: x.exp(), x)
    node = weakref.ref(out.untyped_storage())
    del out
    gc.collect()
    assert node() is None


def test_a_saved_tensor_of_another_device_comes_back_on_its_own():
    saved = SavedOnHost(BufferOnAnyDevice(torch.device("meta"), True), [])
    x = torch.randn(3, requires_grad=True)
    out = saved_graph(saved, lambda x: x.exp().sum(), x)
    assert torch.equal(torch.autograd.grad(out, x)[0], x.detach().exp())


def test_saved_memory_is_given_back_with_the_graph():
    b = buffer()
    saved = SavedOnHost(b, [])
    x = torch.randn(5, requires_grad=True)
    out = saved_graph(saved, lambda x: x.sin().cos().sum(), x)
    waiting = [weakref.ref(x) for x in saved._places.values()]
    b.clear()
    del out, x
    gc.collect()
    assert len(waiting) == 2
    assert [x() for x in waiting] == [None, None]
    assert not saved._known


# Pinned memory, as PyTorch 2.11 counts it


class OnCuda:
    """As much of a CUDA tensor as the buffer's size is taken from."""

    is_cuda, nbytes, dtype = True, 3 * 2**20, torch.float32

    @staticmethod
    def element_size():
        return 4


@pytest.fixture
def pinning(monkeypatch):
    """Ordinary memory in the place of pinned."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))


def test_pinned_bytes_are_counted_as_long_as_they_live(pinning):
    before = pinned_bytes()
    parts = offload._host_parts(OnCuda())
    assert [part.nbytes for part in parts] == [2**21, 2**20]
    assert pinned_bytes() - before == 3 * 2**20
    kept = parts[0].view(2, -1)  # a view keeps its storage
    del parts
    gc.collect()
    assert pinned_bytes() - before == 2**21
    del kept
    gc.collect()
    assert pinned_bytes() == before


def test_the_same_every_is_chosen_at_each_call(pinning, monkeypatch):
    """PyTorch 2.11 counts freed pinned memory as still in use, and more of it after every call."""
    calls = []

    def host_memory_stats():
        calls.append(len(calls))
        return {"allocated_bytes.current": 2**30, "active_bytes.current": 2**34 * len(calls)}

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", host_memory_stats, raising=False)
    monkeypatch.setattr(offload, "_pinned", 0)
    monkeypatch.setattr(offload, "_most_pinned", 0)
    kept = []
    for _ in range(3):
        parts = offload._host_parts(OnCuda())
        kept.append(memory._kept_pinned_bytes())
        del parts
        gc.collect()
        kept.append(memory._kept_pinned_bytes())
    assert kept == [0, 3 * 2**20] * 3  # the rest of the GiB is somebody else's, and may be in use
    assert len(calls) == 6


def test_the_chosen_every_is_logged(caplog):
    with caplog.at_level("INFO", "chopgrad"):
        run("wan2.1", Exact(offload=False))
    assert [record.args[:2] for record in caplog.records] == [(1, 5)]


def test_pageable_memory_where_none_can_be_pinned(monkeypatch):
    empty = torch.empty

    def no_pinned(*size, pin_memory=False, **how):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", no_pinned)
    before = pinned_bytes()
    with pytest.warns(UserWarning, match="No pinned host memory for 3 MiB"):
        parts = offload._host_parts(OnCuda())
    assert sum(part.nbytes for part in parts) == 3 * 2**20
    assert pinned_bytes() == before
