"""Every command that pages and docstrings name exists, with each of its options: by ``--help``; nothing is run."""

import configparser
import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)(`{1,2})((?:python|tox|chopgrad|accelerate) [^`]+)\1(?!`)")
FOLDERS = ("chopgrad", "suite", "analysis", "bench", "report", "weights", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "weights").rglob("*.md")])


def commands(text):
    """Words of each command in blocks of shell and in inline code."""
    blocks = FENCE.findall(text)
    spans = [span.replace("\n", " ") for _, span in INLINE.findall(FENCE.sub("", text))]
    for line in [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in ("&&", ";"):
                words.append(word.rstrip(",;"))
            elif words:
                yield words
                words = []


def problem(words):
    """What is wrong with a command; None for a right one, and for a program that is not of this project."""
    words = words[next((k for k, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)), len(words)) :]
    name, *rest = words or [""]
    if name == "tox":
        return _tox(rest)
    if name == "accelerate":
        rest = rest[next((k for k, w in enumerate(rest) if w == "-m" or w.endswith(".py")), len(rest)) :]
    elif name == "chopgrad":
        rest = ["-m", "chopgrad", *rest]
    elif name != "python":
        return None
    if rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
        if not program.startswith(FOLDERS):
            return None  # pytest, pip
        path = ROOT / program.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    elif rest:
        program, rest = rest[0], rest[1:]
        path = ROOT / program
    else:
        return None  # python itself, accelerate launch of one's own script
    return _options(program, path, rest) if path.is_file() else f"there is no {program}"


def _tox(rest):
    if rest[:1] != ["-e"] or len(rest) < 2:
        return None
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    own = rest[rest.index("--") + 1 :] if "--" in rest else []
    for name in rest[1].split(","):
        if f"testenv:{name}" not in parser:
            return f"there is no tox environment {name}"
        if own and (found := problem([*parser[f"testenv:{name}"]["commands"].replace("{posargs}", "").split(), *own])):
            return found
    return None


def _options(program, path, rest):
    source = path.read_text()
    if any(name in source for name in ("run_main", "tyro", "argparse")):
        subcommand = rest[:1] if program in ("chopgrad", "bench.tasks") and rest[:1] != ["--help"] else []
        text = help_of(program, *subcommand)
    else:
        text = source  # a script of a line or two, which would run
    for word in rest:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z-]*", flag) and not re.search(rf"(?<![\w-]){flag}(?![\w-])", text):
            return f"{program} has no option {flag}"
    return None


@lru_cache
def help_of(program, *subcommand):
    out, before = io.StringIO(), (sys.argv, sys.path[:])
    sys.argv = [program, *subcommand, "--help"]
    with (
        contextlib.redirect_stdout(out),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.suppress(SystemExit),
    ):
        patch.setenv("COLUMNS", "300")
        warnings.simplefilter("ignore", RuntimeWarning)  # a module that was imported before runs a second time
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.argv, sys.path[:] = before
    return out.getvalue()


def problems(path):
    return {" ".join(words): found for words in commands(path.read_text()) if (found := problem(words))}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_of_a_page_exist(path):
    assert problems(path) == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_of_docstrings_exist(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert {p.relative_to(ROOT).as_posix(): found for p in sources if (found := problems(p))} == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("`python analysis/nowhere.py`", "there is no analysis/nowhere.py"),
        ("```bash\nX=1 python -m bench.nothing --full  # why\n```", "there is no bench.nothing"),
        ("```bash\ncd x && python -m bench \\\n  --fulll\n```", "bench has no option --fulll"),
        ("``python -m bench.tasks train --nothing 1``", "bench.tasks has no option --nothing"),
        ("`tox -e nothing`", "there is no tox environment nothing"),
        ("`tox -e bench -- --fulll`", "bench has no option --fulll"),
        ("`chopgrad plan --card 24GiB`", "chopgrad has no option --card"),
        ("`accelerate launch --multi_gpu examples/pixel_loss.py --x 1`", "examples/pixel_loss.py has no option --x"),
        ("`python -m report.docs.reference --chekc`", "report.docs.reference has no option --chekc"),
    ],
)
def test_a_wrong_command_is_found(text, told):
    assert [found for words in commands(text) if (found := problem(words))] == [told]


def test_right_commands_are_left_alone():
    text = "`tox -e lint,types` `python -m pytest -x` `tox -e bench -- --full` `python -m bench` `accelerate launch`"
    assert [problem(words) for words in commands(text)] == [None] * 5
