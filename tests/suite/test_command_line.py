"""How scripts end: one sentence on stderr and status 1 for bad input, a traceback for what nobody expected."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from suite.command_line import run_main

ROOT = Path(__file__).parents[2]
SCRIPT = '''"""What it is for."""
from dataclasses import dataclass

from suite.command_line import run_main


@dataclass
class Config:
    """Settings."""

    count: int = 0
    """How many."""


def main(config):
    if config.count < 0:
        raise ValueError("Pass a count of at least 0.")
    print(1 / config.count)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
'''


@dataclass
class Config:
    """Settings."""

    count: int = 0
    """How many."""


def raising(error):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["--count", "2"], 0, "0.5\n", ""),
        (["--count", "-1"], 1, "", "error: Pass a count of at least 0.\n"),
    ],
)
def test_a_script(tmp_path, words, status, out, err):
    (tmp_path / "script.py").write_text(SCRIPT)
    command, environment = [sys.executable, "script.py", *words], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_help_shows_docstrings_and_a_wrong_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(print, Config, "What it is for.", arguments=["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "What it is for." in shown and "How many." in shown
    with pytest.raises(SystemExit) as stopped:
        run_main(print, Config, "What it is for.", arguments=["--nothing"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("error", "also", "told"),
    [
        (ValueError("bad"), None, "error: bad"),
        (FileNotFoundError("none"), {}, "error: none"),
        (AssertionError("differs"), {AssertionError: ""}, "error: differs"),
        (
            ModuleNotFoundError("no x"),
            {ModuleNotFoundError: "; install x", ImportError: "; no"},
            "error: no x; install x",
        ),
        (ValueError("bad"), {ModuleNotFoundError: "; install x"}, "error: bad"),
    ],
)
def test_what_ends_with_a_sentence(error, also, told):
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(error), Config, None, also, [])
    assert stopped.value.code == told
    assert stopped.value.__cause__ is None and stopped.value.__suppress_context__


def test_any_other_error_is_raised():
    with pytest.raises(RuntimeError, match="unforeseen"):
        run_main(raising(RuntimeError("unforeseen")), Config, None, {AssertionError: ""}, [])
