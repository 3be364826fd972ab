"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(option: str, text: str | None) -> int | None:
    """Raises:
    ValueError: it is no number with a unit.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if not match or match[2].upper() not in UNITS:
        raise ValueError(f"{option} must be a number with a unit, such as 24GiB; got '{text}'.")
    return int(float(match[1]) * UNITS[match[2].upper()])
