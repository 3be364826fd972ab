"""No test may reach for a hub; this must be said before the first import of huggingface_hub."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a whole process; a test may want another."""
    from accelerate.state import AcceleratorState  # the library's own tests run without it

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
