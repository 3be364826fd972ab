"""The page of the cards, from records and nothing else."""

import pytest

from bench.cases import Case, Inside, label
from bench.gpu.figure import figure
from bench.gpu.page import Config, main, page
from bench.gpu.results import case_of, predictions, tables
from bench.gpu.rows import LEAST, OFFLOAD
from chopgrad import Chop, Full
from suite.records import read_records, write_record

GIB = 2**30
MADE_BY = {
    "device": "Card X", "torch": "9.9", "diffusers": "1", "date": "2030-01-01T00:00:00Z", "commit": "b" * 40,
    "command": "python -m bench.gpu",
}  # fmt: skip


def write(folder, method, call="frame_loss", row="wan-short", **metrics):
    case = Case("full:wan2.1", 13, 480, 832, method, "mse", "bfloat16", "cuda")
    settings = case.settings() | {"row": row, "call": call, "channels_last": False, "rounds": 2}
    name = f"{row}-{call}-{label(method)}".replace("/", "-")
    write_record(folder / "card-x" / f"{name}.json", settings, metrics, MADE_BY)
    return case


@pytest.fixture
def results(tmp_path):
    measured = {"first_s": 3.0, "seconds": [2.0, 1.5], "forward_s": 0.5, "out_of_memory": False}
    case = write(tmp_path, Full(), allocated_peak_bytes=50 * GIB, reference=None, repeat_difference=1e-3, **measured)
    write(
        tmp_path, LEAST, allocated_peak_bytes=5 * GIB, pinned_peak_bytes=7 * GIB, time_ratio=2.0, reference="Full()",
        error_to_float32=1e-2, difference_from_reference=2e-2, **measured,
    )  # fmt: skip
    write(
        tmp_path, Chop(1), allocated_peak_bytes=30 * GIB, time_ratio=1.4, reference="Full()",
        error_to_float32=0.77, difference_from_reference=0.88, **measured,
    )  # fmt: skip
    write(tmp_path, OFFLOAD, out_of_memory=True)
    write(
        tmp_path, LEAST, row="repeated", reserved_after_call_bytes=[GIB, 2 * GIB, 2 * GIB], reference=None, **measured
    )
    write_record(
        tmp_path / "predicted" / "card-x" / f"{case.name}.json", case.settings(), {"peak_bytes": 55 * GIB}, MADE_BY
    )
    return tmp_path


def line_of(text, strategy):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {strategy} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_says_what_was_measured(results):
    text = page(results)
    assert "## Card X" in text and "commit bbbbbbbbbb: `python -m bench.gpu`" in text
    header = line_of(text, "strategy")
    least = dict(zip(header, line_of(text, label(LEAST)), strict=True))
    assert least["peak"] == "5.00" and least["pinned"] == "7.00" and least["ratio"] == "2.00"
    assert least["s"] == "1.50" and least["passes"] == "3.00" and least["off float32"] == "1.0e-02"
    full = dict(zip(header, line_of(text, "Full()"), strict=True))
    assert full["p/m"] == "1.100" and full["ratio"] == ""
    assert dict(zip(header, line_of(text, label(OFFLOAD)), strict=True))["peak"] == "out of memory"
    assert "3 calls: 1.00 GiB reserved after the first, 2.00 after the last; it stopped growing at call 2" in text


def test_a_row_that_ran_out_of_memory_costs_no_page(results):
    write(results, LEAST, row="repeated", out_of_memory=True)
    assert f"`{label(LEAST)}`: out of memory." in page(results)


def test_random_weights_say_nothing_of_truncation(results):
    text = page(results)
    assert "7.7e-01" not in text and "8.8e-01" not in text


def test_the_reference_comes_first_and_the_rest_by_memory(results):
    found = tables(read_records(results / "card-x"))
    assert list(found) == ["wan-short", "repeated"]
    assert [r.settings["strategy"] for r in found["wan-short"]][-2:] == [label(Chop(1)), label(LEAST)]
    assert found["wan-short"][0].metrics.get("reference") is None


def test_a_record_tells_its_case(results):
    methods = {case_of(r).strategy for r in read_records(results / "card-x")}
    assert methods == {Full(), LEAST, Chop(1), OFFLOAD}
    assert isinstance(LEAST, Inside)


def test_missing_predictions_are_made(results, monkeypatch, capsys):
    asked = []

    def predicted(cases, first):
        asked.extend(case.strategy for case in cases)
        return {case.name: {"peak_bytes": GIB} for case in cases}

    monkeypatch.setattr("bench.gpu.results.predict_all", predicted)
    main(Config(results))
    assert sorted(map(label, asked)) == sorted(map(label, (LEAST, Chop(1), OFFLOAD)))
    assert sorted(predictions(results, "card-x").values()) == [GIB, GIB, GIB, 55 * GIB]
    assert (results / "card-x.png").exists()
    assert "![Peak memory" in (results / "README.md").read_text()
    assert "Predicted: 3 cases" in capsys.readouterr().out


def test_a_figure_is_drawn(results, tmp_path):
    figure(list(read_records(results / "card-x")), predictions(results, "card-x"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_folder_without_cards_is_told(tmp_path):
    with pytest.raises(ValueError, match="has none"):
        main(Config(tmp_path))
