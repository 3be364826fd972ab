"""How many states an ``Exact`` keeps when it is left to it: as many as half the free memory holds."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import chopgrad
from chopgrad import Exact, memory
from chopgrad.memory import available_bytes
from tests.models import build, latents_for

GROUPS = 17


def steps_taken(monkeypatch, states_that_fit):
    """Steps that a sweep takes when ``states_that_fit`` states are as much as may be kept."""
    vae = build("wan2.1")
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, GROUPS).requires_grad_()
    target = torch.zeros_like(decoder.decode(z.detach()))
    _, state = decoder.step(z[:, :, :1].detach(), decoder.initial_state())
    _, state = decoder.step(z[:, :, 1:2].detach(), state)
    size = sum(x.nbytes for x in tree_leaves(state) if isinstance(x, torch.Tensor))
    monkeypatch.setattr(memory, "available_bytes", lambda device: states_that_fit and 2 * states_that_fit * size)
    step, calls = decoder.step, []
    decoder.step = lambda *args: calls.append(1) or step(*args)
    chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=False)).backward()
    return len(calls)


@pytest.mark.parametrize(
    ("states_that_fit", "every"),
    [
        (None, 1),  # nothing is known
        (GROUPS, 1),
        (GROUPS - 1, 2),  # 9 + 2
        (11, 2),
        (10, 3),  # 6 + 3
        (9, 3),
        (1, 4),  # not even the sparsest fits: it is the best that there is
    ],
)
def test_the_smallest_spacing_that_fits(monkeypatch, states_that_fit, every):
    # A forward pass; a graph of each group (the last one's is built at once); and the states between those kept. The
    # first two are kept, because only the third is of full size; the last is used before it could be let go.
    rebuilt = sum(1 for i in range(2, GROUPS - 1) if i % every)
    assert steps_taken(monkeypatch, states_that_fit) == 2 * GROUPS - 1 + rebuilt


def test_free_memory_is_known_here_and_not_guessed_elsewhere():
    free = available_bytes("cpu")
    assert free is None or 0 < free < 2**50
    assert available_bytes("meta") is None


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rebuilt = sum(1 for i in range(2, GROUPS - 1) if i % 2)
    assert steps_taken(monkeypatch, 2 * GROUPS - 1) == 2 * GROUPS - 1 + rebuilt
    assert steps_taken(monkeypatch, 2 * GROUPS) == 2 * GROUPS - 1


@pytest.fixture
def system_files(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 64 kB\nMemAvailable:   32 kB\n",
        "/sys/fs/cgroup/memory.max": "20000",
        "/sys/fs/cgroup/memory.current": "5000",
        "/sys/fs/cgroup/memory.stat": "anon 2000\nfile 3000\ninactive_file 1000\n",
    }

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    return files


def test_a_control_group_limits_what_is_free(system_files):
    assert available_bytes("cpu") == 20000 - (5000 - 1000)  # the page cache is given up when memory is asked for
    system_files["/sys/fs/cgroup/memory.max"] = "max"
    assert available_bytes("cpu") == 32 * 1024
    del system_files["/sys/fs/cgroup/memory.max"]
    assert available_bytes("cpu") == 32 * 1024
    del system_files["/proc/meminfo"]
    assert available_bytes("cpu") is None


def test_pinned_memory_that_pytorch_keeps_is_free(system_files, monkeypatch):
    """Else the second call of a strategy would find less than the first, which left its buffers in PyTorch's cache."""
    stats = {"allocated_bytes.current": 9000}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: stats, raising=False)
    monkeypatch.setattr("chopgrad.offload._pinned", 2000)
    monkeypatch.setattr("chopgrad.offload._most_pinned", 10000)
    assert available_bytes("cpu") == 16000 + 7000
    monkeypatch.setattr("chopgrad.offload._most_pinned", 5000)  # of the rest nobody knows whether it is in use
    assert available_bytes("cpu") == 16000 + 3000
