"""Processes of a test: copies of one that has imported what takes long, so that none imports it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

METHOD = "forkserver"
"""A fork of the test's own process could inherit a lock that one of its threads holds, or a context of a GPU."""
multiprocessing.set_forkserver_preload(["tests.models", "bench.tasks.training.train"])


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs ``work(*arguments)``."""
    process = multiprocessing.get_context(METHOD).Process(target=_single_threaded, args=(work, *arguments))
    process.start()
    return process


def on_workers(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """``work(rank, *arguments)`` in so many processes; what goes wrong in one of them is raised here."""
    multiprocessing.start_processes(_ranked, (work, arguments), nprocs=count, start_method=METHOD)


def _ranked(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _single_threaded(work, rank, *arguments)


def _single_threaded(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)
