"""Whether the code that made a record has changed since: by git, and by what the record's command imports.

What a command depends on is found in the sources without running them: the script or module that it names, and every
module of the project that these import, wherever in a file the import stands. A record is *current* while none of them
differs from the record's commit in more than comments, docstrings, layout and place (``suite.history``). The working
tree is compared, so an edit that was not committed counts as well.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from suite.history import PACKAGES, changed, git
from suite.records import ROOT, Record

WEIGHTS = {
    name: tuple(f"weights/tiny-{name}/{file}" for file in ("config.json", "diffusion_pytorch_model.safetensors"))
    for name in ("wan2.1", "cogvideox")
}
"""Files of the embedded decoders, by the name under which settings ask for them."""
WITHOUT_WEIGHTS = ("analysis/predicted_memory.py",)
"""What means the published architecture by these names."""
STARTED = {"bench/__main__.py": ("bench/memory.py", "bench/test_time.py")}
"""What a script runs in a process of its own, which no import shows."""
DRAWING = ("/figure.py", "bench/page/", "bench/tasks/comparison.py", "bench/tasks/tables.py", "bench/tasks/publish.py")
"""Parts of the names of sources that read finished records and make pictures and pages of them: no number comes from
there, so neither they nor what only they import count."""
CURRENT, CHANGED, UNCOMMITTED, UNKNOWN = "current", "changed since", "made by uncommitted code", "unknown"


@dataclass(frozen=True)
class Freshness:
    """What is known of one record's code."""

    word: str
    """``current``, ``changed since``, ``made by uncommitted code``, or ``unknown``: without git, without a commit in
    the record, where the commit is not among the ancestors of this working tree, or where the script is gone."""
    files: tuple[str, ...] = ()
    """What changed, relative to the project."""


class History:
    """The git history of a working tree; each commit is compared once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        # A folder that merely lies in somebody's repository has no history of its own; a shallow clone has lost it.
        top, shallow = git(root, "rev-parse", "--show-toplevel"), git(root, "rev-parse", "--is-shallow-repository")
        self.known = top is not None and Path(top.strip()).resolve() == root.resolve() and shallow == "false\n"
        self._changed: dict[str, frozenset[str] | None] = {}
        self._needed: dict[str, frozenset[str]] = {}
        self._imported = lru_cache(None)(lambda file: tuple(imported(root / file, root)))

    def freshness(self, record: Record) -> Freshness:
        """Whether the code of a record's command is what it was."""
        made = record.provenance
        needed = self.dependencies(record)
        if not self.known or not needed or not made.get("commit") or made.get("dirty") is None:
            return Freshness(UNKNOWN)
        changed = self.changed_since(made["commit"])
        if changed is None:
            return Freshness(UNKNOWN)
        files = tuple(sorted(changed & (needed | _packages(needed) | _weights(record))))
        if made["dirty"]:
            return Freshness(UNCOMMITTED, files)
        return Freshness(CHANGED if files else CURRENT, files)

    def dependencies(self, record: Record) -> frozenset[str]:
        """Sources that the record's command runs, relative to the project."""
        start = script_of(str(record.provenance.get("command", "")))
        if start is None or not (self.root / start).is_file():
            return frozenset()
        if start not in self._needed:
            found: set[str] = set()
            todo = [start, *STARTED.get(start, ())]
            while todo:
                file = todo.pop()
                if file not in found and not any(part in file for part in DRAWING):
                    found.add(file)
                    todo += self._imported(file)
            self._needed[start] = frozenset(found)
        return self._needed[start]

    def changed_since(self, commit: str) -> frozenset[str] | None:
        """Files that differ from a commit in more than words; None for a commit outside this history."""
        if commit not in self._changed:
            # Commits that only this copy happens to hold would be judged differently in a fresh clone.
            ours = git(self.root, "merge-base", "--is-ancestor", commit, "HEAD") is not None
            self._changed[commit] = changed(self.root, commit, None, PACKAGES) if ours else None
        return self._changed[commit]


@lru_cache
def _packages(sources: frozenset[str]) -> frozenset[str]:
    """What Python runs before them; of a package that is no more, too."""
    return frozenset((folder / "__init__.py").as_posix() for name in sources for folder in Path(name).parents)


def script_of(command: str) -> str | None:
    """The source that a recorded command starts with: ``python -m bench ...`` -> ``bench/__main__.py``."""
    words = shlex.split(command)
    if words[:1] != ["python"] or len(words) < 2:
        return None
    if words[1] != "-m":
        return words[1] if words[1].endswith(".py") else None
    if len(words) < 3:
        return None
    path = words[2].replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__main__.py"


def imported(file: Path, root: Path = ROOT) -> Iterator[str]:
    """The project's modules that a source imports, relative to ``root``; with each, the packages that it lies in."""
    for module in _modules(file, root):
        parts = module.split(".")
        if parts[0] not in PACKAGES:
            continue
        for k in range(1, len(parts) + 1):
            path = Path(*parts[:k])
            for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
                if (root / candidate).is_file():
                    yield candidate.as_posix()


def _modules(file: Path, root: Path) -> Iterator[str]:
    package = file.relative_to(root).parent.as_posix().replace("/", ".")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _weights(record: Record) -> frozenset[str]:
    """Files of the embedded weights that a record used."""
    if script_of(str(record.provenance.get("command", ""))) in WITHOUT_WEIGHTS:
        return frozenset()
    text = str(record.settings)
    return frozenset(file for name, files in WEIGHTS.items() if f"'{name}" in text for file in files)
