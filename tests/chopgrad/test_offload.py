"""The offload buffer: values survive the way to the host and back, and the device copies are let go in time."""

import pytest
import torch
from torch.nn import functional as F

from chopgrad import Chop, Exact, engine
from chopgrad.offload import OffloadBuffer, Offloaded
from tests.chopgrad.test_gradient import case, compare
from tests.models import VAES


class BufferOnAnyDevice(OffloadBuffer):
    """Really copies on a CPU too, where the ordinary buffer hands tensors back as they are."""

    def __init__(self, device, enabled):
        super().__init__(device, enabled)
        self.enabled = enabled


def buffer():
    return BufferOnAnyDevice(torch.device("cpu"), True)


def test_on_a_cpu_nothing_moves():
    x = torch.ones(3)
    ordinary = OffloadBuffer(torch.device("cpu"), True)
    assert ordinary.put(x) is x
    assert ordinary.get(x) is x


def test_a_tree_comes_back_as_it_was():
    tree = ("Rep", None, [torch.randn(2, 3), torch.randn(4).to(torch.bfloat16)])
    b = buffer()
    offloaded = b.put(tree)
    assert offloaded[:2] == ("Rep", None)
    assert all(isinstance(x, Offloaded) for x in offloaded[2])
    b.clear()
    back = b.get(b.fetch(offloaded))
    for a, b in zip(back[2], tree[2], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.data_ptr() != b.data_ptr()


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
    assert offloaded.host.untyped_storage().nbytes() == 8 * 4


@pytest.mark.parametrize("name", VAES)
def test_every_offloading_strategy_against_brute_force(name, monkeypatch):
    monkeypatch.setattr(engine, "OffloadBuffer", BufferOnAnyDevice)
    vae, z, target = case(name, 5)
    strategies = [Exact(offload=True, every=k, pieces=p) for k in (None, 1, 2, 3) for p in (False, True)]
    strategies += [Chop(d, block=w, offload=True) for d in (0, 2) for w in (1, 2)]
    strategies += [Chop(1, block=2, recompute=True, offload=True, pieces=p) for p in (False, True)]
    compare(vae, z, target, F.mse_loss, strategies)


def test_pageable_memory_where_none_can_be_pinned(monkeypatch):
    class OnCuda:
        """As much of a CUDA tensor as the buffer's size is taken from."""

        is_cuda, nbytes, shape = True, 2**21, (2**19,)

    made = []

    def empty_like(like, device, pin_memory=False):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        made.append(device)
        return "buffer"

    monkeypatch.setattr(torch, "empty_like", empty_like)
    from chopgrad.offload import _host_buffer

    with pytest.warns(UserWarning, match="No pinned host memory for 2 MiB"):
        assert _host_buffer(OnCuda()) == "buffer"
    assert made == ["cpu"]
