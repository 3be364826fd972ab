"""Notebooks explain, scripts compute: ``python -m report.notebooks`` executes ``notebooks/``; ``--check`` compares.

A notebook reads records, draws and asserts. What its cells print and show is committed with it, without anything that
differs between two executions, so that a fresh execution tells whether notebook, figures and records still agree.
"""

from __future__ import annotations

import base64
import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report.figures import difference, drawn_by
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT

FOLDER = ROOT / "notebooks"
SECONDS = 300
"""Limit of one cell: a notebook that computes is a mistake."""
PICTURE = "image/png"


@dataclass
class Config:
    """Settings of the execution."""

    names: tuple[str, ...] = ()
    """Only these (fig3_temporal_locality, ...)."""
    check: bool = False
    """Write nothing; end with status 1 where a fresh execution differs from what is committed."""


def paths(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks, in order of name.

    Raises:
        ValueError: no notebook of this name.
    """
    found = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"There is no notebook '{unknown[0]}': pass some of {', '.join(found)}.")
    return [path for name, path in found.items() if not names or name in names]


def read(path: Path) -> Any:
    """A notebook as it lies on disk."""
    import nbformat  # only people who execute notebooks have it

    return nbformat.read(path, as_version=4)


@contextmanager
def kernel() -> Iterator[Any]:
    """A kernel for several executions, which import what they share once; each begins without names or figures."""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.util import run_sync

    manager = AsyncKernelManager(kernel_name="python3")
    try:
        yield manager
    finally:
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)


EMPTY = """
import matplotlib.pyplot
matplotlib.pyplot.close("all")
matplotlib.rcdefaults()
get_ipython().reset(new_session=True)
"""
"""What a kernel runs before each notebook but its first."""


def executed(notebook: Any, name: str, manager: Any = None) -> Any:
    """A fresh execution, from the project's root; in a kernel of its own, or in that of ``kernel()``.

    Raises:
        AssertionError: a cell failed; the message holds the end of its traceback.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell

    fresh = clean(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    used = manager is not None and manager.has_kernel
    if used:
        fresh.cells.insert(0, new_code_cell(EMPTY))
    place = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(fresh, timeout=SECONDS, kernel_name="python3", resources=place, km=manager)
    try:
        client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"})
    except CellExecutionError as error:
        trace = re.sub(r"\x1b\[[\d;]*m", "", error.traceback)  # colours of a terminal
        raise AssertionError(f"{name}: {error.ename}: {error.evalue}\n{trace[-2000:]}") from None
    finally:
        if manager is not None and client.kc is not None:
            client.kc.stop_channels()
    del fresh.cells[: int(used)]
    return clean(fresh)


def clean(notebook: Any) -> Any:
    """A copy without what differs between executions: times, kernels, versions, and warnings of other packages."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = {}, f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def differences(committed: Any, fresh: Any) -> Iterator[str]:
    """Where a fresh execution says or shows something else than what is committed.

    Pictures that one version of Matplotlib drew are compared pixel by pixel (rounding may move one in ten thousand);
    those of two versions only exist on both sides, since fonts and lines may fall on other pixels.
    """
    if len(committed.cells) != len(fresh.cells):
        yield f"{len(committed.cells)} cells are committed, {len(fresh.cells)} were executed"
        return
    for number, (old, new) in enumerate(zip(committed.cells, fresh.cells, strict=True), 1):
        if old.source != new.source:
            yield f"cell {number}: its source differs"
        if old.cell_type != "code":
            continue
        before, after = list(_shown(old)), list(_shown(new))
        if [kind for kind, _ in before] != [kind for kind, _ in after]:
            kinds = [", ".join(kind for kind, _ in shown) or "nothing" for shown in (before, after)]
            yield f"cell {number}: shows {kinds[1]}; committed is {kinds[0]}"
            continue
        for (kind, one), (_, other) in zip(before, after, strict=True):
            if kind != PICTURE and one != other:
                yield f"cell {number}: says\n{other}\ncommitted is\n{one}"
            if kind == PICTURE and (told := _pictures(one, other)):
                yield f"cell {number}: {told}"


def _shown(cell: Any) -> Iterator[tuple[str, str]]:
    """(kind, content) of everything under a cell."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.name, output.text
        for kind, content in sorted(output.get("data", {}).items()):
            yield kind, content if isinstance(content, str) else "".join(content)


def _pictures(one: str, other: str) -> str | None:
    before, after = base64.b64decode(one), base64.b64decode(other)
    if drawn_by(before) != drawn_by(after):
        return None
    share = difference(before, after)
    return f"its picture differs in {100 * share:.2g} % of the pixels" if share >= 1e-4 else None


def main(config: Config) -> None:
    import nbformat

    told = []
    for path in track(paths(config.names), description="notebooks"):
        committed = read(path)
        fresh = executed(committed, path.stem)
        if config.check:
            told += [f"{path.stem}, {line}" for line in differences(committed, fresh)]
        else:
            nbformat.write(fresh, path)
    if told:
        raise ValueError("\n".join([*told, "Execute them again: python -m report.notebooks"]))


if __name__ == "__main__":
    wanted = "; install what executes notebooks: pip install nbclient ipykernel"
    run_main(main, Config, __doc__, {ModuleNotFoundError: wanted, AssertionError: ""})
