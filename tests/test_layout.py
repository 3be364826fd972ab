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
    own = {*LAYERS, "tests"}
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {(p.relative_to(ROOT).as_posix(), n) for p in paths for n in imported(p.read_text()) if n in own}
    assert {(path, name) for path, name in found if name not in LAYERS[folder] | {folder}} == set()


def modules(source, package, known):
    """Those of the known modules that a source imports. ``from package import module`` needs the module alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield from (name for name in (whole if whole in known else base,) if name in known)


def test_no_modules_import_each_other():
    """Neither directly nor around a corner, nor inside functions."""
    paths = [p.relative_to(ROOT) for folder in LAYERS for p in (ROOT / folder).rglob("*.py")]
    names = {p: ".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths}
    known = set(names.values())
    graph = {name: set(modules((ROOT / p).read_text(), p.parent.parts, known)) - {name} for p, name in names.items()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_a_circle_is_found():
    sources = {
        "a": "from p import b\n", "p": "from p.c import x\n", "p.b": "def f():\n    from p import x\n",
        "p.c": "import a\n",
    }  # fmt: skip
    graph = {name: set(modules(text, tuple(name.split(".")[:-1]), sources)) for name, text in sources.items()}
    assert graph == {"a": {"p.b"}, "p": {"p.c"}, "p.b": {"p"}, "p.c": {"a"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_every_import_is_seen():
    source = "import a.b\nfrom c import d\nfrom . import e\ndef f():\n    from g.h import i\n"
    assert set(imported(source)) == {"a", "c", "g"}


def test_the_files_that_begin_are_there():
    assert [name for name in LONG if not (TESTS / name).is_file()] == []
