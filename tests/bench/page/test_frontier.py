"""The frontier and the curves: the Pareto set, which points are hollow, and pictures that exist."""

import pytest

from bench.baselines import IsolatedLatents
from bench.cases import Case
from bench.page.figure import curves
from bench.page.frontier import Point, frontier, pareto, points
from bench.page.results import Results
from chopgrad import Chop, Exact, Full
from suite.records import provenance, write_record

MADE_BY = provenance() | {"dirty": False}
METHODS = (Full(), Exact(offload=False), Exact(offload=True), Chop(0), Chop(1), IsolatedLatents())
MIB = 2**20


def point(time, memory):
    return Point(Full(), time, memory, None, True)


@pytest.mark.parametrize(
    ("given", "best"),
    [
        ([(1, 9), (2, 5), (3, 7), (4, 1)], [(1, 9), (2, 5), (4, 1)]),  # (3, 7) loses to (2, 5)
        ([(1, 1), (2, 2), (1, 2)], [(1, 1)]),
        ([(1, 5), (1, 5)], [(1, 5)]),
        ([], []),
    ],
)
def test_pareto_set(given, best):
    assert [(p.time, p.memory) for p in pareto([point(*g) for g in reversed(given)])] == best


@pytest.fixture
def measured(tmp_path):
    """Records of one video on a CPU: nothing is offloaded there, and one case was not timed."""
    cases = [Case("wan2.1", n, 40, 40, m) for n in (9, 17) for m in METHODS]
    for k, case in enumerate(cases):
        offloads = case.strategy == Exact(offload=True)
        name = f"{case.name}.json"
        peak = (k + 1) * MIB
        if offloads:
            predicted = {"peak_bytes": peak, "device_bytes": peak + MIB, "host_bytes": 0, "resident_bytes": MIB}
            write_record(tmp_path / "prediction" / name, case.settings(), predicted, MADE_BY)
        else:
            memory = {"out_of_memory": False, "peak_bytes": peak, "weights_bytes": MIB, "latents_bytes": 0}
            write_record(tmp_path / "memory" / name, case.settings(), memory, MADE_BY)
        if not offloads and case.strategy != Chop(0) and case.frames == 17:
            ratio = {"ratio_to_reference": [1.0 + k / 10, 1.0, 2.0], "reference": "Full()", "seconds_median": 1.0}
            write_record(tmp_path / "time" / name, case.settings(), {"out_of_memory": False} | ratio, MADE_BY)
        if case.strategy == Chop(1):
            error = {"relative_error": [0.4, 0.3, 0.5]}
            write_record(tmp_path / "gradient_error" / name, case.settings(), error, MADE_BY)
    return tmp_path, cases


def test_points_tell_measurements_from_predictions(measured):
    folder, cases = measured
    found = {p.method: p for p in points(Results(folder, cases), cases[-1].video)}
    assert set(found) == set(METHODS) - {Chop(0)}  # without a time there is no point
    assert not found[Exact(offload=True)].measured
    assert found[Exact(offload=True)].time == found[Exact(offload=False)].time  # the same work without transfers
    assert all(p.measured for m, p in found.items() if m != Exact(offload=True))
    assert found[Chop(1)].error == 0.4
    assert found[Exact(offload=False)].error is None


def test_where_full_does_not_fit_times_are_ratios_to_what_does(tmp_path):
    cases = [Case("wan2.1", 17, 40, 40, m) for m in (Full(), Exact(offload=False), Chop(1))]
    for k, case in enumerate(cases):
        memory = {"out_of_memory": case == cases[0], "peak_bytes": k, "weights_bytes": 0, "latents_bytes": 0}
        write_record(tmp_path / "memory" / f"{case.name}.json", case.settings(), memory, MADE_BY)
        ratio = {
            "ratio_to_reference": [1 + k / 10, 1.0, 2.0],
            "reference": "Exact(offload=False)",
            "seconds_median": 1.0,
        }
        time = {"out_of_memory": True} if case == cases[0] else {"out_of_memory": False} | ratio
        write_record(tmp_path / "time" / f"{case.name}.json", case.settings(), time, MADE_BY)
    results = Results(tmp_path, cases)
    assert results.reference(cases[0]) == "Exact(offload=False)"
    assert results.time(cases[2]) is None
    assert {p.method: p.time for p in points(results, cases[0])} == {Exact(offload=False): 1.1, Chop(1): 1.2}


@pytest.mark.parametrize("draw", [frontier, curves])
def test_figures(measured, tmp_path, draw):
    folder, cases = measured
    draw(folder, cases, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    draw(tmp_path / "nowhere", cases, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1_000
