"""Result records: one self-describing JSON file per case, ``results/<area>/<case>.json``.

A record has three parts: ``settings`` (every parameter, the seed included), ``metrics`` (numbers with their unit in the
name, intervals beside means) and ``provenance`` (what made it). Tables and figures read nothing else.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from suite.history import PACKAGES, git

PARTS = ("settings", "metrics", "provenance")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Record:
    """One result as read back from disk."""

    path: Path
    settings: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Command, code, date, versions and device of this process; no host name and no absolute path."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    commit, dirty = _commit()
    return {
        "command": _command(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "chopgrad": importlib.metadata.version("chopgrad"),
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def write_record(
    path: Path, settings: Mapping[str, Any], metrics: Mapping[str, Any], made_by: Mapping[str, Any]
) -> Path:
    """Write one record atomically: a reader sees the old file or the new one, never half of either.

    Raises:
        ValueError: a number is not finite; an undefined metric is left out or None.
    """
    record = dict(zip(PARTS, (dict(settings), dict(metrics), dict(made_by)), strict=True))
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"Record '{path.name}' holds a number that is not finite: {error}.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_record(path: Path) -> Record:
    """One record.

    Raises:
        ValueError: not a record; the message says what is wrong with the file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path.name}' is not readable JSON ({error})") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(part), dict) for part in PARTS):
        raise ValueError(f"'{path.name}' is not a result record: it needs the objects {', '.join(PARTS)}")
    return Record(path, *(content[part] for part in PARTS))


def finished(path: Path, settings: Mapping[str, Any], made_by: Mapping[str, Any]) -> Record | None:
    """The record that is there already, if these settings and the same clean commit made it."""
    try:
        old = read_record(path)
    except (ValueError, KeyError):
        return None
    same = old.settings == settings and old.provenance["commit"] == made_by["commit"]
    return old if same and not made_by["dirty"] else None


def read_records(folder: Path) -> Iterator[Record]:
    """Every record of a folder in order of name; half-written and foreign files are reported and skipped."""
    for path in sorted(Path(folder).glob("*.json")):
        try:
            yield read_record(path)
        except ValueError as error:
            warnings.warn(f"skipped: {error}.", stacklevel=2)


def _command() -> str:
    """The command line with paths relative to the project (or only their last part, when outside it)."""
    words = [_shorten(word) for word in sys.argv]
    if words and Path(sys.argv[0]).name == "__main__.py":
        words[:1] = ["-m", _shorten(str(Path(sys.argv[0]).parent)).replace("/", ".")]
    return "python " + shlex.join(words)


def _shorten(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and not Path(word).is_absolute():
        return f"{name}={_shorten(value)}"
    path = Path(word)
    if not path.is_absolute() and ".." not in path.parts:
        return word
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether the code differed from it); without git, what ``CHOPGRAD_COMMIT`` says, or nothing.

    That variable is for machines that the code was copied to: the output of ``git describe --always --abbrev=40
    --exclude='*' --dirty``, which ends in ``-dirty`` where the code differed.

    It differs where a tracked file does, or where there is a source that git neither tracks nor ignores and that could
    be imported. Other new files (notes, clips) decide nothing unseen, and results being written do not count at all.
    """
    top = git(ROOT, "rev-parse", "--show-toplevel")
    # A copy inside another repository is not what that repository's commit says.
    commit = git(ROOT, "rev-parse", "HEAD") if top is not None and Path(top.strip()).resolve() == ROOT else None
    tracked = git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    importable = [f"{package}/*.py" for package in (*PACKAGES, "report")]
    new = git(ROOT, "ls-files", "--others", "--exclude-standard", "--", *importable)
    if commit is None or tracked is None or new is None:
        given = re.fullmatch(r"([0-9a-f]{40})(-dirty)?", os.environ.get("CHOPGRAD_COMMIT", ""))
        return (given[1], given[2] is not None) if given else (None, None)
    return commit.strip(), bool(tracked or new)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
