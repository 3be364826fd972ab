"""Full-size decoders at a glance, and each prediction beside its measurement: from the records only."""

import pytest
from matplotlib import pyplot as plt

from bench.cases import Case
from bench.page.figure import curves
from bench.page.full_size import accuracy, glance
from bench.page.results import Results
from bench.page.tables import report
from chopgrad import Chop, Exact, Full
from suite.records import provenance, write_record

MADE_BY = provenance() | {"dirty": False}
GIB = 2**30


def write(folder, kind, case, **metrics):
    write_record(folder / kind / f"{case.name}.json", case.settings(), metrics, MADE_BY)


def memory(folder, case, gib):
    write(folder, "memory", case, out_of_memory=False, peak_bytes=gib * GIB, weights_bytes=GIB, latents_bytes=0)


def prediction(folder, case, gib):
    write(folder, "prediction", case, peak_bytes=gib * GIB, device_bytes=gib * GIB, host_bytes=0, resident_bytes=0)


@pytest.fixture
def measured(tmp_path):
    """Peaks in proportion to the frames with ``Full()``, constant with ``Chop(1)``, predicted 2 % lower; one time."""
    by = {(n, m): Case("full:wan2.1", n, 64, 64, m) for n in (5, 9, 41) for m in (Full(), Chop(0), Chop(1), Chop(2))}
    for n in (9, 41):
        for method, gib in ((Full(), n), (Chop(1), 4)):
            memory(tmp_path, by[n, method], gib)
            prediction(tmp_path, by[n, method], 0.98 * gib)
    prediction(tmp_path, by[41, Chop(2)], 6)
    for n, mean in ((9, 1.5), (41, 1.75)):
        ratio = {"ratio_to_reference": [mean] * 3, "reference": "Full()", "seconds_median": 1.0}
        write(tmp_path, "time", by[n, Chop(1)], out_of_memory=False, **ratio)
    return tmp_path, list(by.values())


def cells(lines, start):
    (line,) = [x for x in "\n".join(lines).splitlines() if x.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_at_a_glance(measured):
    lines = glance(Results(*measured))
    assert cells(lines, "full:wan2.1, Chop(1)") == [
        "1.50 to 1.75 (2)",
        "0.10 to 0.44 (2)",
        "1.00 (41 / 9 frames of 64x64)",
    ]
    assert cells(lines, "full:wan2.1, Full()") == ["", "1.00 (2)", "4.56 (41 / 9 frames of 64x64)"]
    assert not any("Chop(0)" in line for line in lines)  # of it nothing is known


def test_every_measurement_stands_beside_its_prediction(measured):
    lines = accuracy(Results(*measured))
    assert cells(lines, "full:wan2.1") == ["9f 64x64", "41f 64x64"]
    assert cells(lines, "Chop(1)") == ["1.020 (4.0 GiB)"] * 2
    assert not any("Chop(2)" in line for line in lines)  # predicted only


def test_embedded_decoders_have_neither(tmp_path):
    case = Case("wan2.1", 9, 16, 16, Exact(offload=False))
    memory(tmp_path, case, 1)
    prediction(tmp_path, case, 1)
    assert glance(Results(tmp_path, [case])) == accuracy(Results(tmp_path, [case])) == []


def test_the_page_names_what_nothing_is_known_of(measured):
    folder, chosen = measured
    text = report(folder, [*chosen, Case("full:cogvideox", 9, 128, 128, Full())], "bench-published")
    assert "Nothing is known yet of full:cogvideox, 128x128." in text
    assert "### full:wan2.1, 64x64" in text and "### full:cogvideox" not in text


def test_the_figure_tells_predicted_from_measured(measured, monkeypatch):
    folder, chosen = measured
    monkeypatch.setattr(plt, "close", lambda figure: None)
    unknown = [Case("full:wan2.1", n, 128, 128, Full()) for n in (5, 9, 17, 41)]
    curves(folder, [*unknown, *chosen, Case("full:cogvideox", 9, 128, 128, Full())], folder / "figure.png")
    figure = plt.gcf()
    assert "64x64" in figure.axes[0].get_title()
    assert len(figure.axes) == 3  # of CogVideoX nothing is known
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["Chop(2)"].get_linestyle() == "--" and lines["Chop(2)"].get_markerfacecolor() == "none"
    assert lines["Chop(1)"].get_linestyle() == "-" and lines["Chop(1)"].get_markerfacecolor() != "none"
    by_distance = figure.axes[1].lines
    assert [list(line.get_xdata()) for line in by_distance] == [[1], [1, 2], [1]]  # measured ones again, filled
    assert [line.get_markerfacecolor() == "none" for line in by_distance] == [False, True, False]
    plt.close("all")
