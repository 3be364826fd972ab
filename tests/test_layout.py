"""The layers of the project: which of its folders may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "chopgrad": set(),
    "suite": {"chopgrad"},
    "analysis": {"chopgrad", "suite", "bench"},
    "bench": {"chopgrad", "suite", "analysis"},
    "weights": {"chopgrad", "suite"},
    "report": {"chopgrad", "suite", "analysis", "bench"},
    "examples": {"chopgrad", "suite"},
}


def imported(source):
    """Top-level names that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", LAYERS)
def test_a_folder_imports_only_what_lies_below_it(folder):
    own = {*LAYERS, "docs", "tests"}
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {(p.relative_to(ROOT).as_posix(), n) for p in paths for n in imported(p.read_text()) if n in own}
    assert {(path, name) for path, name in found if name not in LAYERS[folder] | {folder}} == set()


def test_every_import_is_seen():
    source = "import a.b\nfrom c import d\nfrom . import e\ndef f():\n    from g.h import i\n"
    assert set(imported(source)) == {"a", "c", "g"}
