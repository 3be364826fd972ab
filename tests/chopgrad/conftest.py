"""What several of the library's tests share."""

import pytest

from tests.models import VAES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per VAE that holds a config and no weights."""
    folder = tmp_path_factory.mktemp("configs")
    for name in VAES:
        VAES[name]().save_config(folder / name)
    return folder
