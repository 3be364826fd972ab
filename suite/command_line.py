"""How a script begins and ends: settings from the command line, and bad input told in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        main(tyro.cli(settings, description=description, args=arguments))
    except foreseen as error:
        advice = next((text for kind, text in also.items() if isinstance(error, kind)), "")
        raise SystemExit(f"error: {error}{advice}") from None
