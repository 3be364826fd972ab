"""How a script begins and ends: settings from the command line, and bad input told in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro


def run_main(
    main: Callable[[Any], object],
    settings: Any,
    description: str | None,
    also: Mapping[type[Exception], str] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """``main`` of the settings that the command line gives.

    Args:
        settings: the dataclass of the script's settings, or a union of subcommands.
        description: the script's docstring, for ``--help``.
        also: what ends the script with a sentence besides ValueError and OSError, and what to add to that sentence.
            The first that fits counts.
        arguments: words of the command line (default: those of this process).

    Raises:
        SystemExit: status 1 and the error's message on stderr, without a traceback; status 2 for a wrong option.
    """
    also = also or {}
    foreseen: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        main(tyro.cli(settings, prog=_program(), description=description, args=arguments))
    except foreseen as error:
        advice = next((text for kind, text in also.items() if isinstance(error, kind)), "")
        raise SystemExit(f"error: {error}{advice}") from None


def _program() -> str:
    """As people type it: ``python -m bench.tasks``, ``python analysis/gradient_bias.py``."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        package = [folder for folder in reversed(path.parents) if (folder / "__init__.py").is_file()]
        return f"python -m {'.'.join(folder.name for folder in package)}"
    return f"python {path.parent.name}/{path.name}" if path.suffix == ".py" else path.name
