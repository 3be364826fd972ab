"""``PeakMemory`` against allocations whose peak is known."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chopgrad.memory import PeakMemory, available_bytes


def views():
    a = torch.zeros(1000)
    b = a.view(10, 100).t()[2:]
    del a
    return b[0]  # 4000 bytes, however many views


def freed():
    a = torch.zeros(1000)
    del a
    return torch.zeros(500)


def overlapping():
    a = torch.zeros(1000)
    b = torch.ones(500)
    del a
    return b, torch.zeros(250)


def in_place():
    a = torch.zeros(1000)
    return a.add_(1).mul_(2)


def saved_for_backward():
    x = torch.zeros(1000, requires_grad=True)  # 4000
    y = x.exp().exp()  # each saves its result: 8000
    del x
    return y


def backward():
    x = torch.zeros(1000, requires_grad=True)  # 4000
    y = x.exp()  # saved: 4000
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))  # 4000 for the ones, 4000 for the gradient
    return g


KNOWN = {views: 4000, freed: 4000, overlapping: 6000, in_place: 4000, saved_for_backward: 12000, backward: 16000}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("work", KNOWN, ids=lambda f: f.__name__)
def test_known_peaks(work, fake):
    if fake:
        with FakeTensorMode(), PeakMemory() as memory:
            work()
    else:
        with PeakMemory() as memory:
            work()
    assert memory.peak_bytes == KNOWN[work]


def test_what_was_there_before_is_not_counted():
    before = torch.zeros(1000)
    with PeakMemory() as memory:
        before.add_(1)
        part = before[:10]
        after = part + 1
    assert memory.peak_bytes == after.nbytes


def test_fake_tensors_larger_than_any_machine():
    with FakeTensorMode(), PeakMemory() as memory:
        torch.zeros(2**45) + 1
    assert memory.peak_bytes == 2 * 4 * 2**45


def test_peak_is_known_after_an_exception_and_blocks_nest():
    with pytest.raises(RuntimeError, match="mine"), PeakMemory() as outer:
        a = torch.zeros(100)
        with PeakMemory() as inner:
            torch.zeros(50)
        del a
        raise RuntimeError("mine")
    assert (inner.peak_bytes, outer.peak_bytes) == (200, 600)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 11), (0.5, 10), (0.25, 0)])
def test_a_process_that_is_allowed_a_share_of_the_card_has_no_more(fraction, expected, monkeypatch):
    """Ten of the card's 80 GiB are free, and one of 31 that PyTorch holds."""
    gib = {"memory_reserved": 31, "memory_allocated": 30}
    for name, value in gib.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: {0: fraction}[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert available_bytes("cuda") == expected * 2**30
