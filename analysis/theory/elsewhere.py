"""Claims of the paper that others than the theory test: memory and time the benchmark, training the end tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from analysis.theory.questions import anchor
from analysis.theory.summary import Trial
from bench.page.results import Results
from bench.page.scaling import claims as of_memory_and_time
from bench.page.tables import BENCHMARKS, SCALING
from bench.selection import PAPER, cases
from bench.tasks.comparison import claims as of_end_task
from bench.tasks.comparison import results_of
from chopgrad import Full


def from_elsewhere(results: Path) -> Iterator[Trial]:
    """From the folders beside that of the theory's records; nothing where there are none."""
    for name, selection in BENCHMARKS.items():
        page = f"{name}.md"
        link = f"[{page}]({page}#{anchor(SCALING)})"
        asked = [case for case in cases(selection) if case.strategy in (Full(), *PAPER)]
        for vae, found in of_memory_and_time(Results(results / selection.folder, asked)).items():
            yield from (Trial(claim, vae, link) for claim in found)
    for task in results_of(results / "tasks"):
        vae = str(task.records[0].settings["vae"])
        yield from (Trial(claim, vae, "[tasks](tasks/README.md)") for claim in of_end_task(task))
