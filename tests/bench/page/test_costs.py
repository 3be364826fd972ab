"""The table that opens the benchmark's page: ratios to full back-propagation, of whatever was measured."""

from dataclasses import replace

import pytest

from bench.baselines import FirstLatents
from bench.cases import Case, Inside
from bench.page.costs import costs, representative
from bench.page.results import Results
from bench.page.tables import report
from chopgrad import Chop, Exact, Full, Sampled
from suite.records import provenance, write_record

MADE_BY = provenance() | {"dirty": False}
MIB = 2**20
METHODS = (FirstLatents(), Sampled(2), Chop(1), Full(), Exact(offload=False), Exact(offload=True))


def write(folder, kind, case, **metrics):
    write_record(folder / kind / f"{case.name}.json", case.settings(), metrics, MADE_BY)


def memory(folder, case, mib):
    write(folder, "memory", case, out_of_memory=False, peak_bytes=mib * MIB, weights_bytes=MIB, latents_bytes=0)


def prediction(folder, case, mib):
    write(folder, "prediction", case, peak_bytes=mib * MIB, device_bytes=0, host_bytes=0, resident_bytes=0)


def time(folder, case, mean, reference="Full()"):
    ratio = [mean, mean - 0.1, mean + 0.1]
    write(folder, "time", case, out_of_memory=False, ratio_to_reference=ratio, reference=reference, seconds_median=1.0)


def out_of_memory(folder, case):
    for kind in ("memory", "time"):
        write(folder, kind, case, out_of_memory=True)


def rows(lines):
    table = [line for line in "\n".join(lines).splitlines() if line.startswith("| ")]
    header, *found = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return header, {row[0]: row[1:] for row in found}


@pytest.fixture
def measured(tmp_path):
    """One video where all is known, and a longer one of which less is."""
    cases = [Case("wan2.1", n, 40, 40, m) for n in (17, 33) for m in METHODS]
    by = {(c.frames, c.strategy): c for c in cases}
    for method, mib in ((FirstLatents(), 5), (Sampled(2), 15), (Chop(1), 10), (Full(), 20), (Exact(offload=False), 5)):
        memory(tmp_path, by[17, method], mib)
        time(tmp_path, by[17, method], 1 + mib / 10)
    prediction(tmp_path, by[17, Exact(offload=True)], 1)
    for method, error in ((Chop(1), 0.194), (Exact(offload=False), 1e-6), (Sampled(2), 1.5)):
        spread = {"relative_error_of_mean": [error], "relative_variance": [error]}
        write(tmp_path, "gradient_error", by[17, method], relative_error=[error, error, error], **spread)
    memory(tmp_path, by[33, Full()], 40)
    return tmp_path, cases


def test_each_strategy_has_its_price(measured):
    header, found = rows(costs(Results(*measured)))
    assert header == ["strategy", "wan2.1: peak", "wan2.1: time", "wan2.1: error"]
    assert found == {
        "Full()": ["1.00", "3.00 [2.90, 3.10]", "exact"],
        "Exact(offload=False)": ["0.25", "1.50 [1.40, 1.60]", "exact"],
        "Exact(offload)": [
            "*p* 0.050",
            "*t* 1.50 [1.40, 1.60]",
            "exact",
        ],  # the time of Exact(offload=False): no transfers
        "Chop(1) (the paper's)": ["0.50", "2.00 [1.90, 2.10]", "0.19"],
        "Sampled(2) (estimate)": ["0.75", "2.50 [2.40, 2.60]", "1.50"],
        "FirstLatents() (baseline)": ["0.25", "1.50 [1.40, 1.60]", ""],
    }
    assert list(found)[:3] == [
        "Full()",
        "Exact(offload=False)",
        "Exact(offload)",
    ]  # exact ones first, whatever the order of cases
    text = "\n".join(costs(Results(*measured)))
    assert "wan2.1, 17 frames of 40x40, MSE." in text
    assert "*p*: predicted" in text and "*t*: without transfers" in text


def test_an_exact_gradient_that_is_not_exact_is_seen(measured):
    folder, cases = measured
    case = next(c for c in cases if c.frames == 17 and c.strategy == Exact(offload=False))
    write(folder, "gradient_error", case, relative_error=[0.02, 0.01, 0.03])
    assert rows(costs(Results(folder, cases)))[1]["Exact(offload=False)"][2] == "0.02"


def test_the_video_is_the_one_of_which_most_is_known(measured):
    folder, cases = measured
    assert representative(Results(folder, cases), "wan2.1").frames == 17
    small = folder / "small"
    for case in cases:
        memory(small, case, 1)
    assert representative(Results(small, cases), "wan2.1").frames == 33  # as much of both: the larger
    memory(small, replace(cases[0], frames=9), 1)
    for case in cases:
        prediction(small, replace(case, frames=193), 1)
    longer = [replace(case, frames=n) for case in cases for n in (9, case.frames, 193)]
    assert representative(Results(small, longer), "wan2.1").frames == 33  # the longest is only predicted
    assert representative(Results(folder / "nowhere", cases), "wan2.1") is None
    assert costs(Results(folder / "nowhere", cases)) == []


def test_decoders_that_were_not_measured_take_no_room(measured):
    folder, cases = measured
    others = [Case("cogvideox", 17, 40, 40, m) for m in METHODS]
    assert rows(costs(Results(folder, [*cases, *others]))) == rows(costs(Results(folder, cases)))


def test_where_full_back_propagation_does_not_fit(tmp_path):
    methods = (Full(), Exact(offload=False), Chop(1), Inside("residual", Chop(1)))
    cases = [Case("full:wan2.1", 97, 480, 832, m, dtype="bfloat16", device="cuda") for m in methods]
    full, exact, chop, inside = cases
    out_of_memory(tmp_path, full)
    memory(tmp_path, exact, 10)
    time(tmp_path, exact, 1.0, "Exact(offload=False)")
    memory(tmp_path, chop, 20)
    time(tmp_path, chop, 1.2, "Exact(offload=False)")
    lines = costs(Results(tmp_path, cases))
    header, found = rows(lines)
    assert header == ["strategy", "full:wan2.1: peak", "full:wan2.1: time", "full:wan2.1: error"]
    assert found == {
        "Full()": ["out of memory", "out of memory", "exact"],
        "Exact(offload=False)": ["10.0 MiB", "1.00 [0.90, 1.10] of Exact(offload=False)", "exact"],
        "Chop(1) (the paper's)": [
            "20.0 MiB",
            "1.20 [1.10, 1.30] of Exact(offload=False)",
            "",
        ],  # random weights: no error
    }
    assert "random" in lines[-1]
    prediction(tmp_path, full, 100)
    _, found = rows(costs(Results(tmp_path, cases)))
    assert found["Full()"][0] == "out of memory (*p* 1.00)" and found["Exact(offload=False)"][0] == "*p* 0.10"
    memory(tmp_path, inside, 4)
    assert rows(costs(Results(tmp_path, cases)))[1]["Chop(1), checkpoint=residual"] == ["*p* 0.040", "", ""]


def test_a_small_run_has_a_page_too(tmp_path):
    case = Case("cogvideox", 9, 16, 16, Chop(1))
    memory(tmp_path, case, 3)
    text = report(tmp_path, [case], "bench-cpu")
    assert "| Chop(1) (the paper's) |         3.0 MiB |" in text
    assert "cogvideox: time" not in text and "Do memory and time scale" not in text


def test_the_page_opens_with_what_is_asked_first(measured):
    text = report(*measured, "bench-cpu")
    order = ["Measured on", "## What each strategy costs", "![Curves]", "## All measurements", "### wan2.1, 40x40",
             "## How good the predictions are", "## Targets of this project"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
