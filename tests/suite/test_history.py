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


def test_what_is_gone_or_moved_is_a_change(tmp_path):
    git = repository(tmp_path, FILES)
    old = git("rev-parse", "HEAD")
    git("mv", "suite/a.py", "suite/moved.py")
    assert changed(tmp_path, old, None, PATHS) == {"suite/a.py", "suite/moved.py"}
    assert changed(tmp_path, old, committed(git), PATHS) == {"suite/a.py", "suite/moved.py"}


def test_where_git_cannot_tell(tmp_path):
    assert changed(tmp_path, "HEAD", None, PATHS) is None
    head = repository(tmp_path, FILES)("rev-parse", "HEAD")
    assert changed(tmp_path, "0" * 40, None, PATHS) is None
    assert changed(tmp_path, head, "0" * 40, PATHS) is None
