"""The tables of the results, written again from the records and nothing else: ``python -m report.pages``.

The scripts that measure write the same pages by the same functions; after a change of those, this brings the committed
ones up to date without measuring anything. Pages that are written together with their one record are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis import lost_psnr, predicted_memory, theory_page
from bench.gpu.page import page as gpu_page
from bench.gpu.results import cards
from bench.page.results import Results
from bench.page.tables import BENCHMARKS
from bench.page.tables import report as bench_report
from bench.selection import cases
from bench.tasks import tables as end_tasks
from bench.tasks.comparison import results_of
from suite.command_line import run_main
from suite.records import ROOT, read_records

Writing = Callable[[], str]


@dataclass
class Config:
    """Settings of the writing."""

    results: Path = ROOT / "results"
    """Folder of the records and of the pages."""


def pages(results: Path) -> Mapping[str, Writing]:
    """Path of each page within the folder of results -> what writes its text. Pages without records are left out."""
    found: dict[str, Writing] = {}
    if any(record.metrics.get("claims") for record in read_records(results / "theory")):
        found["theory.md"] = lambda: theory_page.report(results / "theory")
    for name, selection in BENCHMARKS.items():
        chosen = cases(selection)
        folder = results / selection.folder
        if Results(folder, chosen).records:
            found[f"{name}.md"] = lambda f=folder, c=chosen, n=name: bench_report(f, c, n)  # type: ignore[misc]
    if cards(results / "gpu"):
        found["gpu/README.md"] = lambda: gpu_page(results / "gpu")
    if predicted := {r.path.stem: r for r in read_records(results / "predicted_memory")}:
        names = [*predicted_memory.CASES, *predicted_memory.CURVES]
        ordered = {name: predicted[name] for name in names if name in predicted}
        found["predicted_memory/README.md"] = lambda: predicted_memory.report(ordered)
    if tasks := results_of(results / "tasks"):
        found |= {f"tasks/{r.task}.md": lambda r=r: end_tasks.table(r) for r in tasks}  # type: ignore[misc]
        found["tasks/README.md"] = lambda: end_tasks.overview(tasks, "tox -e tasks -- --full")
    if tuned := results_of(results / "tuned_decoder"):
        found["tuned_decoder/README.md"] = lambda: end_tasks.controls(tuned[0])
    if any(read_records(results / "lost_psnr")):
        found["lost_psnr/README.md"] = lambda: lost_psnr.report(results / "lost_psnr", lost_psnr.ASKED, full=True)
    return found


def main(config: Config) -> None:
    known = pages(config.results)
    if not known:
        raise ValueError(f"--results must be a folder of records, but '{config.results.name}' has none.")
    for name, write in known.items():
        (config.results / name).write_text(write())
    print(f"Written: {', '.join(known)}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
