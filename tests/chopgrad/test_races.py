"""Copies on side streams against the computation: every two accesses to one memory are ordered, by vector clocks.

No GPU is needed: operators run on the CPU one after the other, and only what the streams wait for is followed. A read
and a write, or two writes, on two streams race where neither stream had waited for the other in between; so does memory
that is given back to the stream it came from while another may still be at work on it.
"""

import gc
import weakref
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import chopgrad
from chopgrad import Chop, Exact, Sampled, engine, offload
from chopgrad.memory import tensors
from chopgrad.offload import OffloadBuffer
from tests.models import VAES, build, latents_for


class Stream:
    """A vector clock: how far this stream is, and how far each other one was when it was last waited for."""

    def __init__(self, name):
        self.name, self.clock = name, defaultdict(int)

    def tick(self):
        self.clock[self.name] += 1
        return self.clock[self.name]

    def wait_event(self, clock):
        for name, time in clock.items():
            self.clock[name] = max(self.clock[name], time)

    def wait_stream(self, other):
        self.wait_event(other.clock)

    def record_event(self):
        return dict(self.clock)

    def synchronize(self):
        """The host waits, which every later operator then does too."""


class Machine(TorchDispatchMode):
    """Three streams, and who has read and written which storage when."""

    def __init__(self):
        super().__init__()
        self.compute, self.out, self.back = (Stream(name) for name in ("compute", "out", "back"))
        self.current = [self.compute]
        self.races, self.copies = set(), 0
        self._accesses, self._home, self._alive = defaultdict(list), {}, {}

    @contextmanager
    def stream(self, stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def host(self, parts):
        """PyTorch gives pinned memory back only when the copies from it are over: its death is no race."""
        for part in parts:
            self._know(part.untyped_storage(), None)
        return parts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        stream = self.current[-1]
        time = stream.tick()
        out = func(*args, **(kwargs or {}))
        taken = {id(x.untyped_storage()): x.untyped_storage() for x in tensors((args, kwargs or {}))}
        given = {id(x.untyped_storage()): x.untyped_storage() for x in tensors(out)}
        named = zip(func._schema.arguments, args, strict=False)
        passed = [*named, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in (kwargs or {}))]
        changed = {
            id(x.untyped_storage()) for a, x in passed if a.alias_info and a.alias_info.is_write for x in tensors(x)
        }
        if given and not changed and set(given) <= set(taken):
            return out  # a view
        self.copies += stream is not self.compute
        written = set(given) | changed
        for key, storage in (taken | given).items():
            if key not in self._home:
                self._know(storage, stream)
            self._access(key, stream, time, key in written, func)
        return out

    def _know(self, storage, home):
        key = id(storage)  # its Python object lives exactly as long as the storage
        self._home[key] = home
        self._alive[key] = weakref.ref(storage, lambda _: self._dies(key))

    def _access(self, key, stream, time, writes, func):
        for other, then, wrote in self._accesses[key]:
            if other is not stream and (writes or wrote) and stream.clock[other.name] < then:
                self.races.add(f"{func} on {stream.name} follows no {'write' if wrote else 'read'} on {other.name}")
        self._accesses[key].append((stream, time, writes))

    def _dies(self, key):
        home, accesses = self._home.pop(key), self._accesses.pop(key, [])
        self._alive.pop(key)
        if home is not None and any(home.clock[other.name] < then for other, then, _ in accesses if other is not home):
            self.races.add(f"memory of {home.name} is given back while it is in use")


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    host_parts = offload._host_parts

    class Buffer(OffloadBuffer):
        def __init__(self, device, enabled):
            super().__init__(device, enabled)
            self.enabled = enabled
            self._out, self._back = (machine.out, machine.back) if enabled else (None, None)

    monkeypatch.setattr(engine, "OffloadBuffer", Buffer)
    monkeypatch.setattr(offload, "SMALLEST_PART", 2**10)
    monkeypatch.setattr(offload, "_host_parts", lambda x: machine.host(host_parts(x)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: machine.current[-1])
    monkeypatch.setattr(torch.cuda, "stream", machine.stream)
    return machine


STRATEGIES = [
    *(Exact(offload=True, every=k, pieces=p) for k in (1, 3) for p in (False, True)),
    *(Chop(d, block=w, offload=True) for d in (0, 1, 2) for w in (1, 2)),
    *(Chop(d, block=2, recompute=True, offload=True, pieces=p) for d in (0, 1) for p in (False, True)),
    Sampled(1, Exact(offload=True, pieces=True)),
]


def loss_that(fails):
    calls = []

    class FailsBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("the user's own error")

    def loss(x, y):
        calls.append(1)
        if fails == "forward" and len(calls) == 3:
            raise RuntimeError("the user's own error")
        if fails == "backward" and x.requires_grad and len(calls) >= 3:
            x = FailsBackward.apply(x)
        return F.mse_loss(x, y)

    return loss


def sweep(machine, name, strategy, checkpoint=None, fails=None, whole=False):
    decoder = chopgrad.decoder_for(build(name, torch.float32), checkpoint=checkpoint)
    z = latents_for(decoder.vae, 5).requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    with machine:
        try:
            if whole:
                F.mse_loss(chopgrad.decode(decoder, z, strategy), target).backward()
            else:
                chopgrad.frame_loss(decoder, z, target, loss_that(fails), strategy).backward()
        except RuntimeError as error:
            if "the user's own error" not in str(error):
                raise
        gc.collect()


@pytest.mark.parametrize("fails", [None, "forward", "backward"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_no_copy_races_with_the_computation(machine, strategy, fails):
    sweep(machine, "wan2.1", strategy, fails=fails)
    assert machine.copies > 10
    assert machine.races == set()


@pytest.mark.parametrize("checkpoint", [None, "frame"])
@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("whole", [False, True], ids=["frame_loss", "decode"])
def test_no_decoder_makes_a_copy_race(machine, whole, name, checkpoint):
    sweep(machine, name, Exact(offload=True, pieces=True), checkpoint, whole=whole)
    assert machine.copies > 10
    assert machine.races == set()


def nothing(*args):
    pass


@pytest.mark.parametrize(
    ("where", "what", "strategy"),
    [
        # What leaves is overwritten or given back before the copy is over; what comes back is read before it arrives.
        (OffloadBuffer, "settle", Exact(offload=True, every=1)),
        (OffloadBuffer, "settle", Chop(1, offload=True)),
        # A copy begins before the computation has written what it copies, or is done with the memory it copies to.
        (Stream, "wait_stream", Exact(offload=True, every=1)),
        (Stream, "wait_stream", Exact(offload=True, pieces=True, every=1)),
    ],
)
def test_a_missing_wait_is_found(machine, monkeypatch, where, what, strategy):
    monkeypatch.setattr(where, what, nothing)
    sweep(machine, "wan2.1", strategy)
    assert machine.races


def test_memory_given_back_after_an_error_without_waiting_is_found(machine, monkeypatch):
    monkeypatch.setattr(OffloadBuffer, "__exit__", nothing)
    sweep(machine, "wan2.1", Exact(offload=True, pieces=True, every=1), fails="forward")
    assert machine.races


def test_streams_are_made_once_for_each_device(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    offload._streams.cache_clear()
    device = torch.device("cuda", 0)
    buffers = [OffloadBuffer(device, True) for _ in range(40)]
    assert made == [device, device]
    assert len({id(b._out) for b in buffers}) == len({id(b._back) for b in buffers}) == 1
    assert buffers[0]._out is not buffers[0]._back
    offload._streams.cache_clear()
