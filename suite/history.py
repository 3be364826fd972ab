"""What differs between a commit and another one, or the working tree, in more than words and places: by git.

Comments, docstrings and layout are words. A source that lies elsewhere, with nothing new in it but the names by which
it imports others that lie elsewhere, has only moved.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

PACKAGES = ("chopgrad", "suite", "analysis", "bench", "weights")
"""What measures, or is measured; ``report`` only reads records."""
IMPORTS = (ast.Import, ast.ImportFrom)
PLACES = ("__file__", "__package__")
"""Names by which a source knows where it lies: where it says one, a move is more than a move."""


def changed(root: Path, old: str, new: str | None, paths: Sequence[str]) -> frozenset[str] | None:
    """Files under ``paths`` that differ; of Python sources, in more than comments, docstrings, layout and place.

    Args:
        root: the working tree.
        old: a commit.
        new: another one; None for the working tree, with what nobody has added to git yet.

    Returns:
        Names relative to ``root``, those of files that are gone included; None where git cannot tell, for want of git
        or of a commit.

    Cost: a handful of processes, and every source that differs is parsed twice.
    """
    commits = [old] if new is None else [old, new]
    listed = git(root, "diff", "--name-only", "--no-renames", *commits, "--", *paths)
    if listed is None:
        return None
    names = set(listed.splitlines())
    if new is None:
        names.update((git(root, "ls-files", "--others", "--exclude-standard", "--", *paths) or "").splitlines())
    before = _sources(root, old, names)
    after = _sources(root, new, names)
    origins = _origins(before, after, git(root, "diff", "--name-status", "-M", "-l0", *commits, "--", *paths) or "")
    modules = {_module(name): _module(origin) for name, origin in origins.items()}
    known = _known(root, old)
    differing = {
        name
        for name, source in after.items()
        if not _same_code(before.get(origins.get(name, name)), source, origins.get(name, name), name, modules)
        or known.get(_module(name), {name}) - {name, origins.get(name)}  # it hides another module of this name
    }
    left = {name for name in before.keys() - after.keys() if not _is_empty_package(before[name], name)}
    gone = left - {origin for name, origin in origins.items() if name not in differing}
    return frozenset(differing | gone | {name for name in names if not name.endswith(".py")})


def _known(root: Path, commit: str) -> dict[str, set[str]]:
    """Module -> its files, of a commit."""
    found: dict[str, set[str]] = {}
    for name in (git(root, "ls-tree", "-r", "--name-only", commit) or "").splitlines():
        if name.endswith(".py"):
            found.setdefault(_module(name), set()).add(name)
    return found


def git(root: Path, *words: str) -> str | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.quotePath=off", *words], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


@dataclass(frozen=True)
class _Code:
    """A source without its words.

    Attributes:
        body: everything, with a mark in the place of each run of imports.
        imports: of each run, what is imported, by its whole name, and what it is called here.
    """

    body: str
    imports: tuple[tuple[tuple[str, str], ...], ...]

    def moved(self, modules: Mapping[str, str]) -> _Code:
        """The same with the names that modules had before; imports of a run in order of name, where that may be."""
        runs = (tuple((_origin(what, modules), called) for what, called in run) for run in self.imports)
        return _Code(self.body, tuple(run if _order_counts(run) else tuple(sorted(run)) for run in runs))


def _sources(root: Path, commit: str | None, names: Iterable[str]) -> dict[str, str]:
    """The Python sources among the names that are there."""
    sources = sorted(name for name in names if name.endswith(".py"))
    if commit is None:
        return {name: (root / name).read_text() for name in sources if (root / name).is_file()}
    wanted = "".join(f"{commit}:{name}\n" for name in sources).encode()
    words = ["git", "cat-file", "--batch"]  # one process for all of them
    text = subprocess.run(words, cwd=root, input=wanted, capture_output=True, check=True).stdout
    found, place = {}, 0
    for name in sources:
        head, place = text[place : (end := text.index(b"\n", place))], end + 1
        if not head.endswith(b" missing"):
            size = int(head.split()[2])
            found[name], place = text[place : place + size].decode(), place + size + 1
    return found


def _origins(before: Mapping[str, str], after: Mapping[str, str], renamed: str) -> dict[str, str]:
    """New name -> old name of what lies elsewhere: with the same code, else as git pairs them, else of the same name.

    A wrong pair does no harm: what is not the same code is told.
    """
    gone, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    by_body: dict[str, list[str]] = {}
    for name in gone:
        if body := _code(before[name], name).body:
            by_body.setdefault(body, []).append(name)
    found = {}
    for name in added:
        alike = by_body.get(_code(after[name], name).body, [])
        if alike:
            found[name] = min(alike, key=lambda old: (Path(old).name != Path(name).name, old))
    for line in renamed.splitlines():
        status, *pair = line.split("\t")
        if status.startswith("R") and pair[1] in added and pair[1] not in found and pair[0] in gone:
            found[pair[1]] = pair[0]
    for name in added:
        alike = [old for old in gone if Path(old).name == Path(name).name]
        if name not in found and len(alike) == 1:
            found[name] = alike[0]
    return found


def _same_code(before: str | None, after: str, old: str, new: str, modules: Mapping[str, str]) -> bool:
    if before is None:
        return _is_empty_package(after, new)
    code = _code(after, new)
    if old != new and any(f"id='{name}'" in code.body for name in PLACES):
        return False
    return _code(before, old).moved({}) == code.moved(modules)


def _is_empty_package(source: str, name: str) -> bool:
    return Path(name).name == "__init__.py" and _code(source, name) == _Code("", ())


def _origin(what: str, modules: Mapping[str, str]) -> str:
    """The name by which a module, or something in it, was imported before the modules moved."""
    if what in modules:
        return modules[what]
    module, _, name = what.rpartition(".")
    return f"{modules[module]}.{name}" if module in modules else what


def _module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _order_counts(run: Sequence[tuple[str, str]]) -> bool:
    """Whether a later import hides an earlier one."""
    names = [called for _, called in run]
    return "*" in names or len(set(names)) < len(names)


@lru_cache(maxsize=2048)
def _code(source: str, name: str) -> _Code:
    """Of a source that cannot be parsed, the source itself."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return _Code(source, ())
    runs: list[tuple[tuple[str, str], ...]] = []
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            lines = getattr(node, field, None)
            if isinstance(lines, list):
                setattr(node, field, _marked([line for line in lines if not _is_text(line)], runs, name))
    return _Code(ast.dump(tree) if tree.body else "", tuple(runs))


def _marked(lines: Sequence[ast.stmt], runs: list[tuple[tuple[str, str], ...]], file: str) -> list[ast.stmt]:
    """The lines with one mark for each run of imports, which goes to ``runs``."""
    kept: list[ast.stmt] = []
    for imports, group in groupby(lines, lambda line: isinstance(line, IMPORTS)):
        if imports:
            runs.append(tuple(pair for line in group for pair in _imported(line, file)))
            kept.append(ast.Expr(ast.Name("imports")))
        else:
            kept += group
    return kept


def _imported(node: ast.AST, file: str) -> Iterable[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = Path(file).parent.parts[: len(Path(file).parent.parts) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        yield from ((f"{base}.{alias.name}", alias.asname or alias.name) for alias in node.names)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
