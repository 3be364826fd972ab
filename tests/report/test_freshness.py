"""Whether the code that made a record has changed since: what counts, and what does not."""

import shutil
from dataclasses import replace

import pytest

from report.freshness import CHANGED, CURRENT, DRAWING, UNCOMMITTED, UNKNOWN, History, imported, script_of
from suite.records import ROOT, Record
from tests.repository import repository

RECORD = Record(ROOT / "x.json", {"vae": "wan2.1"}, {}, {"command": "python analysis/a.py --full", "dirty": False})


@pytest.fixture
def project(tmp_path):
    """A small project under git: a script, a module that it imports in a function, and one that it does not."""
    files = {
        "analysis/__init__.py": "", "suite/__init__.py": "", "chopgrad/__init__.py": "from chopgrad import engine\n",
        "analysis/a.py": "def f():\n    from suite import used\n    return used\n",
        "suite/used.py": "import chopgrad\n", "suite/unused.py": "x = 1\n",
        "chopgrad/engine.py": 'def g():\n    """Text."""\n    return 1  # why\n',
        "weights/tiny-wan2.1/config.json": "{}", "weights/tiny-cogvideox/config.json": "{}", "bench/b.py": "",
    }  # fmt: skip
    git = repository(tmp_path, files)
    commit = git("rev-parse", "HEAD")
    return tmp_path, git, replace(RECORD, provenance=RECORD.provenance | {"commit": commit})


def mark(root, record):
    found = History(root).freshness(record)
    return found.word, found.files


def test_what_only_draws_does_not_count(project):
    root, _, record = project
    (root / "analysis" / "figure.py").write_text("from suite import unused\n")
    (root / "analysis" / "a.py").write_text("from analysis import figure\nfrom suite import used\n")
    assert History(root).dependencies(record) == {
        "analysis/__init__.py", "analysis/a.py", "suite/__init__.py", "suite/used.py", "chopgrad/__init__.py",
        "chopgrad/engine.py",
    }  # fmt: skip


def test_what_draws_writes_no_record():
    drawing = [
        p
        for folder in ("analysis", "bench")
        for p in (ROOT / folder).rglob("*.py")
        if any(part in p.as_posix() for part in DRAWING)
    ]
    assert len(drawing) >= 9
    assert not [p.name for p in drawing if "write_record" in p.read_text() or "run_case" in p.read_text()]


def test_what_a_command_imports(project):
    root, _, record = project
    assert History(root).dependencies(record) == {
        "analysis/a.py", "suite/__init__.py", "suite/used.py", "chopgrad/__init__.py", "chopgrad/engine.py"
    }  # fmt: skip
    (root / "suite" / "relative.py").write_text("from . import used\nfrom .unused import x\nimport os.path\n")
    assert set(imported(root / "suite" / "relative.py", root)) == {
        "suite/__init__.py", "suite/used.py", "suite/unused.py"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("chopgrad/engine.py", "def g():\n    return 2\n", CHANGED),
        ("chopgrad/engine.py", 'def g():\n\n    """Other words."""\n    return (1)\n', CURRENT),
        ("suite/used.py", "import chopgrad.new\n", CHANGED),
        ("suite/unused.py", "x = 2\n", CURRENT),
        ("bench/new.py", "x = 2\n", CURRENT),
        ("weights/tiny-wan2.1/config.json", '{"a": 1}', CHANGED),
        ("weights/tiny-cogvideox/config.json", '{"a": 1}', CURRENT),
    ],
)
def test_a_change_is_marked_whether_committed_or_not(project, name, text, word):
    root, git, record = project
    assert mark(root, record) == (CURRENT, ())
    (root / name).write_text(text)
    expected = (word, (name,) if word == CHANGED else ())
    assert mark(root, record) == expected
    git("add", "-A")
    git("commit", "-qm", "b")
    assert mark(root, record) == expected


def test_a_module_that_is_gone_or_new_is_a_change(project):
    root, _, record = project
    (root / "chopgrad" / "new.py").write_text("")
    (root / "suite" / "used.py").write_text("import chopgrad.new\n")
    assert mark(root, record) == (CHANGED, ("chopgrad/new.py", "suite/used.py"))


def test_a_package_that_is_gone_is_a_change(project):
    root, git, record = project
    (root / "suite" / "__init__.py").write_text("x = 1\n")
    git("commit", "-qam", "b")
    record = replace(record, provenance=record.provenance | {"commit": git("rev-parse", "HEAD")})
    assert mark(root, record) == (CURRENT, ())
    (root / "suite" / "__init__.py").unlink()
    assert mark(root, record) == (CHANGED, ("suite/__init__.py",))


def test_a_record_stays_current_when_its_code_moves(project):
    root, git, record = project
    (root / "suite" / "room").mkdir()
    git("mv", "suite/used.py", "suite/room/used.py")
    (root / "suite" / "room" / "__init__.py").write_text("")
    script = root / "analysis" / "a.py"
    script.write_text(script.read_text().replace("from suite import used", "from suite.room import used"))
    assert mark(root, record) == (CURRENT, ())
    git("add", "-A")
    git("commit", "-qm", "b")
    assert mark(root, record) == (CURRENT, ())
    (root / "suite" / "room" / "used.py").write_text("import chopgrad\n\nx = 1\n")
    assert mark(root, record) == (CHANGED, ("suite/room/used.py",))


def test_code_that_is_not_known(project, tmp_path_factory):
    root, git, record = project
    made = record.provenance
    assert mark(root, replace(record, provenance=made | {"dirty": True}))[0] == UNCOMMITTED
    for unknown in ({"commit": None, "dirty": None}, {"commit": "0" * 40}, {"command": "python analysis/gone.py"}):
        assert mark(root, replace(record, provenance=made | unknown))[0] == UNKNOWN
    git("commit", "-q", "--amend", "-m", "rewritten", "--date", "2001-01-01T00:00:00")  # git still holds the old one
    assert mark(root, record)[0] == UNKNOWN
    unpacked = tmp_path_factory.mktemp("unpacked") / "project"
    shutil.copytree(root, unpacked, ignore=shutil.ignore_patterns(".git"))
    assert not History(unpacked).known and mark(unpacked, record)[0] == UNKNOWN


def test_a_shallow_clone_has_no_history(project, tmp_path_factory):
    root, git, record = project
    git("commit", "-q", "--allow-empty", "-m", "b")
    clone = tmp_path_factory.mktemp("shallow") / "project"
    git("clone", "-q", "--depth", "1", root.as_uri(), str(clone))
    assert not History(clone).known and mark(clone, record)[0] == UNKNOWN


def test_an_archive_inside_another_repository_has_no_history(project):
    root, _, record = project
    inner = root / "inner"
    shutil.copytree(root / "analysis", inner / "analysis")
    assert not History(inner).known and mark(inner, record)[0] == UNKNOWN


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("python analysis/gradient_bias.py --vae wan2.1", "analysis/gradient_bias.py"),
        ("python -m bench --phases time", "bench/__main__.py"),
        ("python -m bench.tasks run --full", "bench/tasks/__main__.py"),
        ("python -m bench.variants", "bench/variants.py"),
        ("make all", None),
        ("python", None),
    ],
)
def test_the_script_of_a_command(command, script):
    assert script_of(command) == script
