"""The layers of the project: which of its folders may import which, and that no two modules import each other."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.conftest import LONG, TESTS

ROOT = Path(__file__).parents[1]
LAYERS = {
    "chopgrad": set(),
    "suite": {"chopgrad"},
    "bench": {"chopgrad", "suite"},
    "analysis": {"chopgrad", "suite", "bench"},
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


def modules(source, package):
    """Whole names that a source imports, each as a module and as something in one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
            yield base


def test_no_modules_import_each_other():
    """Neither directly nor around a corner, nor inside functions."""
    paths = [p.relative_to(ROOT) for folder in LAYERS for p in (ROOT / folder).rglob("*.py")]
    names = {p: ".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths}
    graph = {
        name: {m for m in modules((ROOT / p).read_text(), p.parent.parts) if m in names.values() and m != name}
        for p, name in names.items()
    }
    # ``from package import module`` needs the module; what else is in the package it does not.
    for name, found in graph.items():
        graph[name] = {m for m in found if not any(other.startswith(f"{m}.") for other in found)}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_a_circle_is_found():
    sources = {"a": "from p import b\n", "p.b": "def f():\n    from p.c import x\n", "p.c": "import a\n"}
    graph = {name: set(modules(text, tuple(name.split(".")[:-1]))) & {*sources} for name, text in sources.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_every_import_is_seen():
    source = "import a.b\nfrom c import d\nfrom . import e\ndef f():\n    from g.h import i\n"
    assert set(imported(source)) == {"a", "c", "g"}


def test_the_files_that_begin_are_there():
    assert [name for name in LONG if not (TESTS / name).is_file()] == []
