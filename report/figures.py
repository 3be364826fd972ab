"""Every figure of the results, drawn again from the records and nothing else: ``python -m report.figures --out DIR``.

The scripts that measure draw the same figures by the same functions. This is the one list of them: the notebooks, the
HTML report and the test that compares the committed pictures with the records read it.
"""

from __future__ import annotations

import io
import posixpath
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from analysis import backbone_gradient, estimators, gradient_bias, predicted_memory, spatial_locality, training_bias
from analysis.backbone import figure as backbone_figure
from analysis.bias import residuals_figure
from analysis.bounds import figure as error_bound_figure
from analysis.estimation import figure as estimators_figure
from analysis.locality import figure as temporal_locality_figure
from analysis.space import figure as spatial_truncation_figure
from analysis.training import figure as training_bias_figure
from bench.gpu.figure import figure as gpu_figure
from bench.gpu.results import cards, compared, predictions
from bench.page.figure import curves
from bench.page.frontier import frontier
from bench.page.results import Results
from bench.page.tables import BENCHMARKS
from bench.selection import cases
from bench.tasks import tables as end_tasks
from bench.tasks.comparison import results_of
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT, Record, read_record, read_records
from suite.vaes import EMBEDDED

Drawing = Callable[[Path], object]
"""Writes a PNG to the path that it is given."""


@dataclass
class Config:
    """Settings of the drawing."""

    out: Path = ROOT / "runs" / "report" / "figures"
    """Folder of the figures; each lies there as it does in the folder of results."""
    results: Path = ROOT / "results"
    """Folder of the records."""


def drawings(results: Path, folder: str | None = None) -> Mapping[str, Drawing]:
    """Path of each figure within the folder of results -> what draws it. Figures without records are left out.

    Args:
        folder: only figures of this folder, for which only its records are read; ``"."`` is the folder of results.
    """
    if folder is None:
        return {name: drawing for known in _FOLDERS for name, drawing in drawings(results, known).items()}
    return _FOLDERS[folder](results) if folder in _FOLDERS else {}


def _of_gradient_bias(results: Path) -> Mapping[str, Drawing]:
    return {
        f"gradient_bias/{record.path.stem}.png": lambda path, r=record: gradient_bias.figure(r, path)  # type: ignore[misc]
        for record in read_records(results / "gradient_bias")
    }


def _of_theory(results: Path) -> Mapping[str, Drawing]:
    folder = results / "theory"
    found: dict[str, Drawing] = {}
    vaes = tuple(EMBEDDED)
    if names := [v for v in vaes if _all(folder, f"temporal_locality-{v}", f"temporal_locality-{v}-untrained")]:
        steps = sorted(folder.glob("temporal_locality-snapshot-*.json"))
        # The function wants the snapshots' own folders, whose names are in those of the records.
        snapshots = [Path(s.stem.removeprefix("temporal_locality-snapshot-")) for s in steps]
        found["temporal_locality"] = lambda path: temporal_locality_figure.figure(folder, names, snapshots, path)
    order = [f"spatial_locality-{v}{suffix}" for v in vaes for suffix in ("-untrained", "")]
    if spatial := _all(folder, *order):
        found["spatial_locality"] = lambda path: spatial_locality.figure(spatial, path)
    if cut := _all(folder, *(f"spatial_truncation-{v}" for v in vaes)):
        found["spatial_truncation"] = lambda path: spatial_truncation_figure.figure(cut, path)
    if kinds := _all(folder, *(f"residuals-{v}" for v in vaes)):
        found["residuals"] = lambda path: residuals_figure.figure(kinds, path)
    if bounds := _all(folder, *(f"error_bound-{v}" for v in vaes)):
        found["error_bound"] = lambda path: error_bound_figure.figure(bounds, path)
    backbone = [
        r for c in backbone_gradient.Config(full=True).cases or () for r in _all(folder, f"backbone_gradient-{c}")
    ]
    if backbone:
        found["backbone_gradient"] = lambda path: backbone_figure.figure(backbone, path)
    published: dict[str, list[Record]] = {}
    for record in read_records(folder):
        if model := record.settings.get("task", {}).get("published"):
            published.setdefault(f"backbone_gradient-{model['pretrained']}", []).append(record)
    for name, measured in published.items():
        found[name] = lambda path, m=measured: backbone_figure.figure(m, path)  # type: ignore[misc]
    if estimates := {c: r for c in estimators.CASES for r in _all(folder, f"estimators-{c}")}:
        found["estimators"] = lambda path: estimators_figure.figure(estimates, path)
    config = training_bias.Config(full=True)
    toys = _all(folder, *(f"training_bias-toy-decay{d}-noise{n}" for d in config.decays for n in config.noises))
    if toys and (end := _all(folder, "training_bias-end_task")):
        found["training_bias"] = lambda path: training_bias_figure.figure(toys, end[0], path)
    return {f"theory/{name}.png": drawing for name, drawing in found.items()}


def _of_benchmarks(results: Path) -> Mapping[str, Drawing]:
    found: dict[str, Drawing] = {}
    for name, selection in BENCHMARKS.items():
        chosen = cases(selection)
        folder = results / selection.folder
        if Results(folder, chosen).records:
            found[f"{name}.png"] = lambda path, f=folder, c=chosen: curves(f, c, path)  # type: ignore[misc]
            found[f"{name}-frontier.png"] = lambda path, f=folder, c=chosen: frontier(f, c, path)  # type: ignore[misc]
    return found


def _of_cards(results: Path) -> Mapping[str, Drawing]:
    folder, found = results / "gpu", {}
    for name, records in cards(folder).items():
        if compared(records):
            predicted = predictions(folder, name)
            found[f"gpu/{name}.png"] = lambda path, r=records, p=predicted: gpu_figure(r, p, path)  # type: ignore[misc]
    return found


def _of_predicted_memory(results: Path) -> Mapping[str, Drawing]:
    predicted = {r.path.stem: r for r in read_records(results / "predicted_memory")}
    names = [*predicted_memory.CASES, *predicted_memory.CURVES]
    ordered = {name: predicted[name] for name in names if name in predicted}
    return {"predicted_memory/curves.png": lambda path: predicted_memory.figure(ordered, path)} if predicted else {}


def _of_tasks(results: Path) -> Mapping[str, Drawing]:
    tasks = results_of(results / "tasks")
    compared = any(len(r.arms) > 1 for r in tasks)
    return {"tasks/differences.png": lambda path: end_tasks.figure(tasks, path)} if compared else {}


def draw(results: Path, name: str) -> bytes:
    """One figure as the bytes of its PNG.

    Raises:
        ValueError: no such figure, or there is no record for it.
    """
    known = drawings(results, posixpath.dirname(name) or ".")
    if name not in known:
        known = drawings(results)
        raise ValueError(f"There is no record for the figure '{name}'; there are records for {', '.join(known)}.")
    return drawn(known[name])


def drawn(drawing: Drawing, path: Path | None = None) -> bytes:
    """The bytes of the PNG; also written, where a path is given."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "figure.png"
        drawing(temporary)
        content = temporary.read_bytes()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return content


def difference(one: bytes, other: bytes) -> float:
    """Share of pixels in which two PNG files differ; 1 where their sizes do.

    Raises:
        ValueError: not a picture.
    """
    pixels = []
    for content in (one, other):
        try:
            with Image.open(io.BytesIO(content)) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"This is not a picture: {error}.") from error
    first, second = pixels
    return 1.0 if first.shape != second.shape else float((first != second).any(-1).mean())


def drawn_by(content: bytes) -> str:
    """Matplotlib's version in a PNG: pictures of two versions need not agree pixel by pixel."""
    with Image.open(io.BytesIO(content)) as picture:
        return str(picture.info.get("Software", ""))


def _all(folder: Path, *names: str) -> list[Record]:
    """These records; none where one of them is missing."""
    paths = [folder / f"{name}.json" for name in names]
    return [read_record(path) for path in paths] if all(path.is_file() for path in paths) else []


_FOLDERS: dict[str, Callable[[Path], Mapping[str, Drawing]]] = {
    "gradient_bias": _of_gradient_bias,
    "theory": _of_theory,
    ".": _of_benchmarks,
    "predicted_memory": _of_predicted_memory,
    "gpu": _of_cards,
    "tasks": _of_tasks,
}


def main(config: Config) -> None:
    known = drawings(config.results)
    if not known:
        raise ValueError(f"No record was found in '{config.results.name}': pass a folder of results.")
    for name, drawing in track(known.items(), description="figures"):
        drawn(drawing, config.out / name)
    print(f"Written: {len(known)} figures in {config.out.name}/: {', '.join(known)}.")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
