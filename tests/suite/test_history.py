"""What differs between commits: code does, words about it do not."""

import pytest

from suite.history import changed
from tests.repository import committed, repository, write

SOURCE = '"""What."""\n\n\ndef f(x):\n    """Why."""\n    return x + 1  # how\n'
FILES = {"suite/a.py": SOURCE, "suite/data.json": "{}", "report/b.py": "x = 1\n", "constraints.txt": "torch==1\n"}
PATHS = ("suite", "constraints.txt")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"suite/a.py": "def f(x):\n    '''Other words.'''\n    return (x +\n            1)\n"}, set()),
        ({"suite/a.py": SOURCE.replace("+ 1", "+ 2")}, {"suite/a.py"}),
        ({"suite/a.py": "def f(:\n"}, {"suite/a.py"}),
        ({"suite/new/c.py": "# nothing\n"}, {"suite/new/c.py"}),
        ({"suite/new/__init__.py": '"""A folder."""\n'}, set()),
        ({"suite/data.json": "{} "}, {"suite/data.json"}),
        ({"constraints.txt": "torch==2\n"}, {"constraints.txt"}),
        ({"report/b.py": "x = 2\n", "note.txt": ""}, set()),
    ],
)
def test_a_commit_against_the_tree_and_another_commit(tmp_path, files, expected):
    git = repository(tmp_path, FILES)
    old = git("rev-parse", "HEAD")
    assert changed(tmp_path, old, None, PATHS) == set()
    write(tmp_path, files)
    assert changed(tmp_path, old, None, PATHS) == expected
    new = committed(git)
    assert changed(tmp_path, old, new, PATHS) == changed(tmp_path, new, old, PATHS) == expected
    write(tmp_path, {"suite/a.py": "later = 1\n"})
    assert changed(tmp_path, old, new, PATHS) == expected


USER = "from suite import a\nimport json\nfrom suite.b import g as h\n\n\ndef k():\n    return a.f(h(json))\n"
MOVED_USER = USER.replace("from suite import a", "from suite.room import new as a").replace("suite.b", "suite.room.b")
MOVING = {"suite/a.py": SOURCE, "suite/b.py": "def g(x):\n    return x\n", "suite/user.py": USER}
MOVED = {
    "suite/room/__init__.py": '"""A room."""\n', "suite/room/new.py": SOURCE, "suite/room/b.py": MOVING["suite/b.py"],
    "suite/user.py": MOVED_USER,
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, set()),
        ({"suite/room/new.py": '"""Elsewhere."""\n' + SOURCE.partition("\n")[2]}, set()),
        # Moved and changed: told once, where it lies now; what imports it is as it was.
        ({"suite/room/b.py": "def g(x):\n    return -x\n"}, {"suite/room/b.py", "suite/b.py"}),
        ({"suite/room/__init__.py": "x = 1\n"}, {"suite/room/__init__.py"}),
        # The same text that imports another module's function of that name is other code.
        (
            {"suite/c.py": "def g(x):\n    return 2\n", "suite/user.py": MOVED_USER.replace("suite.room.b", "suite.c")},
            {"suite/c.py", "suite/user.py"},
        ),
        ({"suite/user.py": MOVED_USER.replace("new as a", "new")}, {"suite/user.py"}),
        ({"suite/user.py": MOVED_USER.replace("import json", "import yaml as json")}, {"suite/user.py"}),
    ],
)
def test_a_pure_move_is_no_change(tmp_path, other, expected):
    git = repository(tmp_path, MOVING)
    old = git("rev-parse", "HEAD")
    git("rm", "-q", "suite/a.py", "suite/b.py")
    write(tmp_path, MOVED | other)
    assert changed(tmp_path, old, None, PATHS) == expected
    assert changed(tmp_path, old, committed(git), PATHS) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "if x:\n    from suite.a import f\nelse:\n    from suite.b import f\n",
            "if x:\n    from suite.b import f\nelse:\n    from suite.a import f\n",
        ),
        (
            "try:\n    from suite.a import f\nexcept ImportError:\n    from suite.b import f\n",
            "try:\n    from suite.b import f\nexcept ImportError:\n    from suite.a import f\n",
        ),
        (
            "def g():\n    from suite.a import f\n    return f\n\ndef h():\n    from suite.b import f\n    return f\n",
            "def g():\n    from suite.b import f\n    return f\n\ndef h():\n    from suite.a import f\n    return f\n",
        ),
        ("from suite.a import f\nfrom suite.b import f\n", "from suite.b import f\nfrom suite.a import f\n"),
        ("from suite.a import *\nfrom suite.b import *\n", "from suite.b import *\nfrom suite.a import *\n"),
        ("import json\n\nx = 1\n", "x = 1\n\nimport json\n"),
    ],
)
def test_where_an_import_stands_counts(tmp_path, before, after):
    git = repository(tmp_path, {"suite/user.py": before})
    old = git("rev-parse", "HEAD")
    write(tmp_path, {"suite/user.py": after})
    assert changed(tmp_path, old, None, PATHS) == {"suite/user.py"}


def test_a_source_that_knows_its_place_changes_by_moving(tmp_path):
    git = repository(tmp_path, {"suite/a.py": "from pathlib import Path\n\nROOT = Path(__file__).parent\n"})
    old = git("rev-parse", "HEAD")
    (tmp_path / "suite" / "room").mkdir()
    git("mv", "suite/a.py", "suite/room/a.py")
    assert changed(tmp_path, old, None, PATHS) == {"suite/room/a.py", "suite/a.py"}


def test_a_module_that_hides_another_is_a_change(tmp_path):
    git = repository(tmp_path, {"suite/a.py": SOURCE, "suite/b.py": "def f(x):\n    return 2\n"})
    old = git("rev-parse", "HEAD")
    (tmp_path / "suite" / "b").mkdir()
    git("mv", "suite/a.py", "suite/b/__init__.py")
    assert "suite/b/__init__.py" in changed(tmp_path, old, None, PATHS)


def test_names_in_any_alphabet(tmp_path):
    git = repository(tmp_path, {"suite/größe.py": "x = 1\n"})
    old = git("rev-parse", "HEAD")
    write(tmp_path, {"suite/größe.py": "x = 2\n"})
    assert changed(tmp_path, old, None, PATHS) == {"suite/größe.py"}


def test_relative_imports_follow_a_move(tmp_path):
    files = {"suite/a.py": SOURCE, "suite/b.py": "from .a import f\nfrom . import a\n\nx = f(1)\n"}
    git = repository(tmp_path, files)
    old = git("rev-parse", "HEAD")
    git("rm", "-q", "suite/b.py")
    write(tmp_path, {"suite/room/b.py": "from .. import a\nfrom ..a import f\n\nx = f(1)\n"})
    assert changed(tmp_path, old, None, PATHS) == set()
    write(tmp_path, {"suite/room/b.py": "from . import a\nfrom ..a import f\n\nx = f(1)\n"})
    assert changed(tmp_path, old, None, PATHS) == {"suite/room/b.py", "suite/b.py"}


def test_what_is_gone_is_a_change(tmp_path):
    git = repository(tmp_path, FILES)
    old = git("rev-parse", "HEAD")
    git("rm", "-q", "suite/a.py")
    assert changed(tmp_path, old, None, PATHS) == {"suite/a.py"}
    assert changed(tmp_path, old, committed(git), PATHS) == {"suite/a.py"}


def test_where_git_cannot_tell(tmp_path):
    assert changed(tmp_path, "HEAD", None, PATHS) is None
    head = repository(tmp_path, FILES)("rev-parse", "HEAD")
    assert changed(tmp_path, "0" * 40, None, PATHS) is None
    assert changed(tmp_path, head, "0" * 40, PATHS) is None
