"""Progress on stderr: a bar on a terminal; without one (a log file, CI, ``nohup``) a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS = 10.0


def track(sequence: Iterable[T], description: str, total: int | None = None, *, transient: bool = False) -> Iterator[T]:
    """The items of a sequence, and how far it is.

    Args:
        total: how many there are; the length of the sequence if None.
        transient: the bar disappears when all is done, and no line says so.
    """
    count = total if total is not None else len(sequence) if isinstance(sequence, Sized) else None
    with Bar(description, count, transient=transient) as bar:
        for item in sequence:
            yield item
            bar.advance()


class Bar:
    """Progress of work that is not a loop over a sequence; use it in a ``with`` block.

    Args:
        total: how many steps there are, if that is known.
        done: how many were done before.
        shown: False shows nothing: one process of several speaks.
    """

    def __init__(
        self, description: str, total: int | None, done: int = 0, *, transient: bool = False, shown: bool = True
    ) -> None:
        self.description, self.total, self.done = description, total, done
        self._console = Console(stderr=True, soft_wrap=True)
        self._terminal, self._shown, self._transient = self._console.is_terminal, shown, transient
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=self._console, transient=transient,
            disable=not (shown and self._terminal),
        )  # fmt: skip
        self._task = self._bar.add_task(description, total=total, completed=done, note="")
        self._note, self._first = "", done
        self._said: int | None = None
        """What the last line said was done."""

    def __enter__(self) -> Self:
        self._bar.start()
        self._begun = self._told = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.stop()
        # Short work said nothing, and needs no last line either.
        if kind is None and self._said not in (None, self.done) and not self._transient:
            self._say()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """So many steps more are done.

        Args:
            note: what is said beside the numbers from now on.
        """
        self.done += steps
        self._bar.update(self._task, advance=steps)
        if note is not None:
            self.note(note)
        if time.monotonic() - self._told >= SECONDS:
            self._say()

    def note(self, note: str) -> None:
        """What is said beside the numbers from now on."""
        self._note = note
        self._bar.update(self._task, note=note)

    def say(self, note: str) -> None:
        """Say at once what is being done, beside the numbers."""
        self.note(note)
        self._say()

    def _say(self) -> None:
        self._told = time.monotonic()
        self._said = self.done
        if not self._shown or self._terminal:
            return
        seconds = self._told - self._begun
        text = f"{self.description}: {self.done}" + (f" of {self.total}" if self.total is not None else "")
        text += f", {_clock(seconds)}"
        if self.total is not None and self._first < self.done < self.total:
            text += f", {_clock(seconds * (self.total - self.done) / (self.done - self._first))} left"
        self._console.print(text + (f", {self._note}" if self._note else ""), highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
