"""``ShapesOnly``: results as on a CPU, also when an operator comes again, and host memory counted apart."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from chopgrad.memory import PeakMemory
from chopgrad.shapes import ShapesOnly


def layout(out):
    outs = out if isinstance(out, list | tuple) else [out]
    return [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in outs]


def gradients(x, w):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, padding=1).square().mean(), [x])


CALLS = {
    "promotion by equal numbers": lambda x, w: (x.int() * 2, x.int() * 2.0, x.bool() * 1, x.bool() * True),
    "convolution": lambda x, w: F.conv2d(x, w, padding=1),
    "channels last": lambda x, w: x.to(memory_format=torch.channels_last) + 1,
    "transposed": lambda x, w: (x.transpose(2, 3) * 2, x * 2),
    "several results": lambda x, w: torch.native_group_norm(x, None, None, 2, 4, 30, 2, 1e-5),
    "views": lambda x, w: [x[:, 1:].view(2, 3, 30), *x.split(2, dim=1)],
    "backward, one gradient not asked for": gradients,
    "reduced to a scalar": lambda x, w: x.mean(),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_real_tensors(name):
    sizes = [(2, 4, 5, 6), (2, 4, 6, 5)]
    real = [layout(CALLS[name](torch.ones(s), torch.ones(3, 4, 3, 3))) for s in sizes]
    with ShapesOnly(), torch.device("meta"):
        for _ in range(3):
            assert [layout(CALLS[name](torch.ones(s), torch.ones(3, 4, 3, 3))) for s in sizes] == real


def test_what_shares_memory_shares_it_every_time():
    with ShapesOnly(), torch.device("meta"):
        x = torch.zeros(4, 6)
        for _ in range(3):
            assert x.add_(1).untyped_storage() is x.untyped_storage()
            assert x.view(3, 8).t().untyped_storage() is x.untyped_storage()
            assert x.clone().untyped_storage() is not x.untyped_storage()
            a, b = x.chunk(2, dim=1)
            assert a.untyped_storage() is b.untyped_storage()
            assert torch.zeros(4, 6).untyped_storage() is not torch.zeros(4, 6).untyped_storage()


def offloading():
    x = torch.ones(100, device="meta") * 2  # 400 + 400
    waiting = torch.empty_like(x, device="cpu")  # 400 on the host
    waiting.copy_(x)
    del x
    back = torch.empty_like(waiting, device="meta")  # at most 800 on the device at a time
    back.copy_(waiting)
    return back, torch.zeros(50, device="cpu"), torch.tensor(1.0, dtype=torch.float64, device="meta")


@pytest.mark.parametrize("mode", [ShapesOnly, FakeTensorMode])
def test_host_memory_is_counted_apart(mode):
    with mode():
        for _ in range(2):
            with PeakMemory("meta") as memory:
                kept = offloading()
            assert (memory.peak_bytes, memory.host_peak_bytes) == (800, 600)
            del kept
