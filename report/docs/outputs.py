"""Outputs in the docs are those of real runs: ``python -m report.docs.outputs``.

Where a page has a line ``<!-- output: COMMAND -->``, the code block after it is what the command printed. This script
runs the commands again and rewrites the blocks; with ``--check`` it only says which differ.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from suite.command_line import run_main
from suite.records import ROOT

FOLDER = ROOT / "docs"
BLOCK = re.compile(r"(<!-- output: (?P<command>.+?) -->\n\n```text\n)(?P<output>(?:(?!```).*\n)*)(?=```\n)")


def run(command: str) -> str:
    """What a command of the docs prints; ``chopgrad`` and ``python`` are those of this environment."""
    program, *arguments = shlex.split(command)
    if program not in ("chopgrad", "python"):
        raise ValueError(f"A command in the docs must begin with chopgrad or python, got '{command}'.")
    words = [sys.executable, *(["-m", "chopgrad"] if program == "chopgrad" else []), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"'{command}' failed: {done.stderr.strip()}")
    return done.stdout.rstrip()


def filled(text: str, output_of: Callable[[str], str], only: str = "") -> str:
    """A page with the outputs of its commands; those without ``only`` in them are left as they are."""

    def fill(match: re.Match[str]) -> str:
        wanted = only in match["command"]
        return match[1] + (f"{output_of(match['command'])}\n" if wanted else match["output"])

    return BLOCK.sub(fill, text)


@dataclass
class Config:
    """Settings of the outputs."""

    check: bool = False
    """Write nothing; only say which pages differ."""
    only: str = ""
    """Only commands with these words in them."""


def main(config: Config) -> None:
    stale = []
    for page in sorted(FOLDER.glob("*.md")):
        before = page.read_text()
        after = filled(before, run, config.only)
        if after != before:
            stale.append(page.name)
            if not config.check:
                page.write_text(after)
    if stale and config.check:
        raise ValueError(f"What commands print differs from {', '.join(stale)}: run python -m report.docs.outputs.")
    if stale:
        print(f"Written: {', '.join(stale)}")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {RuntimeError: ""})
