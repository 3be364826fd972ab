"""Predictions of the published architectures: records are kept, targets judged, and every figure says "predicted"."""

from types import SimpleNamespace

import pytest

from analysis import predicted_memory
from analysis.predicted_memory import Config, figure, main, predict, report
from bench.published import CASES, CURVES, GIB, TARGETS_GIB, least_exact, predictions
from suite.records import provenance, read_record, write_record

MADE_BY = provenance() | {"dirty": False}


def row(strategy, device_gib, distance=None):
    return {
        "strategy": strategy,
        "device_bytes": round(device_gib * GIB),
        "host_bytes": 0,
        "relative_compute": 1.0,
        "relative_seconds": 1.0,
        "distance": distance,
    }


def record(folder, name, rows):
    vae, frames, height, width = (CASES | CURVES)[name]
    settings = {"vae": vae, "frames": frames, "height": height, "width": width, "loss": "mse", "dtype": "bfloat16"}
    return read_record(write_record(folder / f"{name}.json", settings, {"predictions": rows}, MADE_BY))


@pytest.mark.parametrize(("gib", "verdict"), [(3.9, "reached (3.9 GiB)"), (4.1, "NOT reached (4.1 GiB)")])
def test_a_target_is_judged_by_the_least_exact_gradient(tmp_path, gib, verdict):
    name = "wan2.1-720x1280"
    rows = [row("Full()", 900), row("Exact(offload, pieces)", gib), row("Chop(0)", 1, distance=0)]
    text = report({name: record(tmp_path, name, rows)})
    assert TARGETS_GIB[name] == 4
    assert f"Target of 4 GiB for an exact gradient: {verdict}" in text
    assert "**not measured**" in text


def test_records_are_read_back_by_size_and_length(tmp_path):
    record(tmp_path, "wan2.1-480x832", [row("Full()", 400), row("Exact(offload)", 26)])
    record(tmp_path, "wan2.1-480x832-97f", [row("Exact(offload, pieces)", 6), row("Chop(0)", 2, distance=0)])
    record(tmp_path, "wan2.1-480x832-25f", [row("Full()", 100)])
    found = predictions(tmp_path)["wan2.1", 480, 832]
    assert sorted(found) == [25, 97]
    assert set(found[97]) == {"Full()", "Exact(offload)", "Exact(offload, pieces)", "Chop(0)"}
    assert least_exact(found[97])["strategy"] == "Exact(offload, pieces)"


def test_a_finished_case_is_not_predicted_again(tmp_path, monkeypatch):
    calls = []
    nothing = SimpleNamespace(of=lambda *args: [])
    monkeypatch.setattr(predicted_memory, "estimator", lambda *args: calls.append(args) or nothing)
    monkeypatch.setattr(predicted_memory, "provenance", lambda: MADE_BY)
    path = tmp_path / "wan2.1-480x832-25f.json"
    predict("wan2.1-480x832-25f", path)
    predict("wan2.1-480x832-25f", path)
    assert calls == [("wan2.1", 25, 480, 832)]
    monkeypatch.setattr(predicted_memory, "provenance", lambda: MADE_BY | {"commit": "another"})
    predict("wan2.1-480x832-25f", path)
    assert len(calls) == 2


def test_the_figure_is_drawn_from_the_curves(tmp_path):
    names = [n for n in CURVES if "480x832" in n]
    records = {
        n: record(tmp_path, n, [row("Full()", 4.0 * CURVES[n][1]), row("Chop(0)", 21, distance=0)]) for n in names
    }
    figure(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_unknown_case():
    with pytest.raises(ValueError, match=r"Unknown case 'wan3': pass some of wan2\.1-480x832"):
        main(Config(cases=("wan3",)))
