"""What several tests of the analyses share."""

import pytest

from analysis.backbone import samples
from suite.clips import HELD_OUT_CLIPS, packaged_clip


@pytest.fixture(scope="module")
def small_films():
    """The films of the training diet, of which every clip decodes its own part, are small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "training_films", lambda: tuple(packaged_clip(name) for name in HELD_OUT_CLIPS))
        yield
