"""What differs between a commit and another one, or the working tree, in more than words: by git."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

PACKAGES = ("chopgrad", "suite", "analysis", "bench", "weights")
"""What measures, or is measured; ``report`` only reads records."""


def changed(root: Path, old: str, new: str | None, paths: Sequence[str]) -> frozenset[str] | None:
    """Files under ``paths`` that differ; of Python sources, in more than comments, docstrings and layout.

    Args:
        root: the working tree.
        old: a commit.
        new: another one; None for the working tree, with what nobody has added to git yet.

    Returns:
        Names relative to ``root``; None where git cannot tell, for want of git or of a commit.

    Cost: two processes for each source that differs.
    """
    commits = [old] if new is None else [old, new]
    differing = git(root, "diff", "--name-only", "--no-renames", *commits, "--", *paths)
    if differing is None:
        return None
    names = set(differing.splitlines())
    if new is None:
        names.update((git(root, "ls-files", "--others", "--exclude-standard", "--", *paths) or "").splitlines())
    return frozenset(name for name in names if not _same_code(root, old, new, name))


def git(root: Path, *words: str) -> str | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _same_code(root: Path, old: str, new: str | None, name: str) -> bool:
    if not name.endswith(".py"):
        return False
    before, after = _source(root, old, name), _source(root, new, name)
    return before is not None and after is not None and _code(before) == _code(after)


def _source(root: Path, commit: str | None, name: str) -> str | None:
    if commit is not None:
        return git(root, "show", f"{commit}:{name}")
    return (root / name).read_text() if (root / name).is_file() else None


@lru_cache(maxsize=512)
def _code(source: str) -> str:
    """A source without comments, docstrings and layout; the source itself where it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            lines = getattr(node, name, None)
            if isinstance(lines, list):
                kept = [line for line in lines if not _is_text(line)]
                setattr(node, name, kept)
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
