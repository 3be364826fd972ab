"""Notebooks, figures and records agree: each notebook is executed, and compared with what is committed."""

import base64
import copy
import json
import shutil

import pytest

from report import notebooks
from report.figures import difference, draw, drawings
from suite.records import ROOT, read_record

RESULTS = ROOT / "results"
EXPECTED = {
    "fig3_temporal_locality", "fig4_backbone_gradient", "fig5_gradient_bias", "fig6_memory_and_time",
    "fig7_spatial_locality", "frontier", "tables_1_to_4_end_tasks", "verdicts",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_a_kernel(request):
    if "figure" not in request.node.name:
        for package in ("nbformat", "nbclient", "ipykernel"):
            pytest.importorskip(package, reason=f"{package} is not installed (dependency group notebooks)")


@pytest.fixture(scope="module")
def execute():
    """Fresh executions, which share one kernel and so import torch and diffusers once."""
    with notebooks.kernel() as manager:
        yield lambda notebook, name: notebooks.executed(notebook, name, manager)


def book(name):
    return notebooks.read(notebooks.FOLDER / f"{name}.ipynb")


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda p: p.stem)
def test_a_fresh_execution_says_the_same(path, execute):
    committed = notebooks.read(path)
    told = list(notebooks.differences(committed, execute(committed, path.stem)))
    assert told == [], "\n".join([*told, "run python -m report.notebooks"])


def test_there_is_one_a_figure():
    assert {p.stem for p in notebooks.paths()} == EXPECTED


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda p: p.stem)
def test_what_is_committed_is_executed_clean_and_explained(path):
    notebook = notebooks.read(path)
    assert notebooks.clean(notebook) == notebook
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for word in ("**The paper**", "**Where we differ from the paper**" if path.stem != "verdicts" else "**Fails**"):
        assert word in text
    source = "\n".join(c.source for c in code)
    assert "assert " in source
    for computing in ("torch", "load_vae", "decoder_for", "frame_loss", "from_pretrained"):
        assert computing not in source  # notebooks explain


def test_a_changed_record_is_noticed(tmp_path, execute):
    """Both ways: a number that its text contradicts, and one that only differs from what is committed."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS / "theory", folder / "theory")
    path = folder / "theory" / "spatial_locality-wan2.1.json"
    committed = book("fig7_spatial_locality")
    elsewhere = copy.deepcopy(committed)
    elsewhere.cells[1].source = elsewhere.cells[1].source.replace('ROOT / "results"', f"ROOT / {str(folder)!r}")
    assert elsewhere.cells[1].source != committed.cells[1].source

    content = json.loads(path.read_text())
    row = content["metrics"]["curve"]["within_halo"]
    row[2] = [x - 0.001 for x in row[2]]
    path.write_text(json.dumps(content))
    told = "\n".join(notebooks.differences(committed, execute(elsewhere, "fig7")))
    assert "cell 5: says" in told and "cell 3: its picture differs" in told

    row[4] = [0.5, 0.4, 0.6]
    path.write_text(json.dumps(content))
    with pytest.raises(AssertionError, match=r"fig7: AssertionError[\s\S]*within\[HALO\]"):
        execute(elsewhere, "fig7")


def test_a_notebook_leaves_nothing_in_the_kernel_for_the_next(execute):
    from nbformat.v4 import new_code_cell, new_notebook

    one = "from matplotlib import pyplot, rcParams; left = pyplot.figure(dpi=7); rcParams['figure.dpi'] = 7"
    execute(new_notebook(cells=[new_code_cell(one)]), "one")
    other = "from matplotlib import pyplot as p; print(p.get_fignums(), p.rcParams['figure.dpi'], 'left' in globals())"
    fresh = execute(new_notebook(cells=[new_code_cell(other)]), "other")
    assert fresh.cells[0].outputs[0].text == "[] 100.0 False\n"


def test_end_tasks_are_shown_once_they_are_there(tmp_path, execute):
    """Records of the protocol's format, with numbers made up by a rule that the notebook must find again."""
    from suite.metrics import METRICS

    made_by = read_record(RESULTS / "theory" / "toys.json").provenance
    settings = {"task": "driving", "size": [32, 32], "frames": 25, "clips": 8, "test_clips": 4, "steps": 2, "batch": 2,
                "rate": 1e-3, "mixed_precision": "no", "vae": "wan2.1", "perceptual_stride": 4}  # fmt: skip
    folder = tmp_path / "results" / "tasks"
    folder.mkdir(parents=True)
    for arm, gain in (("latent", 0.0), ("chop-1", 1.0), ("exact", 1.0)):
        for seed in (0, 1):
            scores = {
                name: [
                    10 + k + seed + (gain if metric.higher_is_better else -gain) + 0.1 * (arm == "chop-1") * (-1) ** k
                    for k in range(4)
                ]
                for name, metric in METRICS.items()
            }
            metrics = {"per_clip": scores, "fvd": 100.0, "fvd_split_half_noise": 90.0, "missing": {}}
            content = {"settings": settings | {"arm": arm, "seed": seed}, "metrics": metrics, "provenance": made_by}
            (folder / f"driving-{arm}-seed{seed}.json").write_text(json.dumps(content))
    notebook = book("tables_1_to_4_end_tasks")
    notebook.cells[1].source = notebook.cells[1].source.replace('ROOT / "results"', f"ROOT / {str(folder.parent)!r}")
    fresh = execute(notebook, "tables")
    shown = "\n".join(
        content for cell in fresh.cells if cell.cell_type == "code" for _, content in notebooks._shown(cell)
    )
    assert "Table 4: controlled driving video: no record yet" not in shown
    assert "Table 1: video super-resolution: no record yet" in shown
    assert "latent-only, better: PSNR" in shown and "0 are worse and 0 better" in shown
    rows = [
        [x.strip() for x in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("| driving")
    ]
    assert rows == [["driving", "exact", str(len(METRICS)), "0", "0", f"0 of {len(METRICS)}"]]


def test_differences_are_told():
    committed = book("frontier")
    assert list(notebooks.differences(committed, committed)) == []
    other = copy.deepcopy(committed)
    other.cells.pop()
    assert "were executed" in next(notebooks.differences(committed, other))
    other = copy.deepcopy(committed)
    other.cells[1].source += "\n"
    assert list(notebooks.differences(committed, other)) == ["cell 2: its source differs"]
    other = copy.deepcopy(committed)
    other.cells[2].outputs = other.cells[2].outputs[:1]
    assert "cell 3: shows text/markdown, text/plain; committed is" in next(notebooks.differences(committed, other))


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match=r"There is no notebook 'fig9': pass some of fig3_temporal_locality"):
        notebooks.paths(("fig9",))


def test_every_committed_figure_is_drawn_from_records():
    """But for the picture grids of the end tasks, which show restored clips."""
    known = set(drawings(RESULTS))
    there = {p.relative_to(RESULTS).as_posix() for p in RESULTS.rglob("*.png")}
    assert {n for n in there - known if not n.startswith("tasks/")} == set()


def test_a_figure_without_records_is_told():
    with pytest.raises(ValueError, match=r"no record for the figure 'fig9.png'; there are records for gradient_bias/"):
        draw(RESULTS, "fig9.png")


def test_a_changed_figure_differs():
    one, other = draw(RESULTS, "theory/spatial_locality.png"), draw(RESULTS, "predicted_memory/curves.png")
    assert difference(one, one) == 0 and difference(one, other) == 1
    with pytest.raises(ValueError, match="not a picture"):
        difference(base64.b64decode("AAAA"), one)
