"""The benchmark measures what it says, in a process of its own, and keeps what it has measured."""

import pytest

from bench.__main__ import Config, main
from bench.cases import Case, Subject, cases, label
from bench.memory import in_fresh_process, measure_memory
from bench.summary import figure, report
from chopgrad import Chop, Exact, Full
from suite.records import provenance, read_record, write_record

CASE = Case("cogvideox", 9, 16, 16, Chop(1))
MADE_BY = provenance() | {"dirty": False}


@pytest.mark.parametrize("full", [False, True])
def test_cases_have_names_of_their_own(full):
    found = cases("cuda", full)
    names = [case.name for case in found]
    assert len(set(names)) == len(names) > 50
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-x") for name in names)


def test_labels():
    assert label(Full()) == "Full()"
    assert label(Exact(offload=True, every=3, pieces=True)) == "Exact(every=3, offload, pieces)"
    assert label(Chop(2, block=4, recompute=True)) == "Chop(2, block=4, recompute)"


def test_peak_memory_in_a_fresh_process_is_kept(tmp_path, monkeypatch):
    metrics = measure_memory(CASE, tmp_path, MADE_BY)
    subject = Subject(CASE)
    assert metrics["weights_bytes"] == sum(p.nbytes for p in subject.decoder.parameters())
    assert 1e6 < metrics["peak_bytes"] < 1e9
    assert metrics["loss"] == pytest.approx(subject.run()[0].item(), rel=1e-5)
    monkeypatch.setattr("bench.memory.in_fresh_process", None)  # a second measurement would fail
    assert measure_memory(CASE, tmp_path, MADE_BY) == metrics
    with pytest.raises(TypeError):
        measure_memory(CASE, tmp_path, MADE_BY | {"commit": "another"})


def fails(case):
    raise KeyError("reason")


def runs_out(case):
    import torch

    raise torch.OutOfMemoryError("of memory")


def dies(case):
    import os

    os._exit(3)


def test_what_goes_wrong_in_the_process_is_told():
    assert in_fresh_process(runs_out, CASE) == {"out_of_memory": True}
    with pytest.raises(RuntimeError, match=r"cogvideox-9f.*KeyError: 'reason'"):
        in_fresh_process(fails, CASE)
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        in_fresh_process(dies, CASE)


@pytest.mark.parametrize(("frames", "height"), [(8 + 3, 16), (9, 20)])
def test_a_video_that_the_decoder_does_not_give(frames, height):
    with pytest.raises(ValueError, match="cogvideox does not decode to"):
        Subject(Case("cogvideox", frames, height, 16, Full()))


def test_report_and_figure_show_what_is_there_and_what_is_missing(tmp_path):
    chosen = [Case("wan2.1", n, 32, 32, s) for n in (9, 17) for s in (Full(), Chop(1))]
    memory = {"out_of_memory": False, "peak_bytes": 3 * 2**20}
    time = {"out_of_memory": False, "ratio_to_reference": [1.5, 1.4, 1.6], "reference": "Full()"}
    for case in chosen[1:]:
        write_record(tmp_path / "memory" / f"{case.name}.json", case.settings(), memory, MADE_BY)
    write_record(tmp_path / "time" / f"{chosen[1].name}.json", chosen[1].settings(), time, MADE_BY)
    write_record(tmp_path / "time" / f"{chosen[3].name}.json", chosen[3].settings(), {"out_of_memory": True}, MADE_BY)
    text = report(tmp_path, chosen)
    row = next(line for line in text.splitlines() if line.startswith("| Chop(1) "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "3.0 MiB",
        "3.0 MiB",
        "1.50 [1.40, 1.60]",
        "out of memory",
    ]
    assert "not measured" in text
    figure(tmp_path, chosen, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert report(tmp_path / "nowhere", chosen) == "No case was measured.\n"
    assert read_record(tmp_path / "memory" / f"{chosen[1].name}.json").settings["strategy"] == "Chop(1)"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"full": True, "device": "cpu"}, "--full measures the full-size decoders.*run it on a machine with a GPU"),
        ({"rounds": 0, "device": "cpu"}, "--rounds must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(Config(**settings))
