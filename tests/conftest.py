"""No test may reach for a hub; this must be said before the first import of huggingface_hub."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).parent
LONG = (
    "chopgrad/test_planner.py",
    "chopgrad/test_decode.py",
    "chopgrad/test_encode.py",
    "chopgrad/test_lifetime.py",
    "report/test_notebooks.py",
    "chopgrad/test_gradient.py",
    "report/test_html_page.py",
    "examples/test_examples.py",
    "analysis/test_temporal_locality.py",
    "bench/test_bench.py",
    "bench/tasks/test_tables.py",
    "analysis/test_real_models.py",
    "analysis/test_error_bound.py",
    "chopgrad/test_group_losses.py",
)
"""Files that take longest, in order: begun last, one of them would keep a single worker busy at the end."""


def pytest_collection_modifyitems(items):
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker, which makes what its tests share once."""
    from xdist.scheduler import LoadFileScheduling  # the library's own tests may run without it

    if config.getoption("dist") != "load":
        return None
    config.option.loadscopereorder = False  # it would begin with the files of most tests
    return LoadFileScheduling(config, log)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a whole process; a test may want another."""
    from accelerate.state import AcceleratorState  # the library's own tests run without it

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def stock_graphs(monkeypatch):
    """Graphs keep what PyTorch's and the VAE's own operators keep: for what is left to gain where they have to.

    Trainable weights, hooks and wrappers are such cases.
    """
    monkeypatch.setattr("chopgrad.frozen._DIMENSIONS", {})
    monkeypatch.setattr("chopgrad.pieces.wan.takes", lambda norm: False)
    monkeypatch.setattr("chopgrad.decoders.cogvideox.takes", lambda *args: False)
