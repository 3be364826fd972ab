"""Records made again: what is drawn, what counts as a difference, and that nothing is made twice."""

import json
from dataclasses import replace

import pytest

from report import results_index, verify
from report.freshness import History
from report.products import Product
from report.rerun import obstacle, script
from report.results_index import rows
from report.verified import FILE, compare, read_outcomes
from report.verify import Config
from suite.command_line import run_main
from suite.records import ROOT, Record, read_record
from tests.repository import committed, repository

MADE = {"date": "2026-01-01T00:00:00Z", "device": "chip", "torch": "2", "cuda": None, "threads": 1, "dirty": False,
        "diffusers": "1", "command": "python analysis/fake.py --out somewhere"}  # fmt: skip
SCRIPT = f"""
import argparse, json, subprocess, time
from pathlib import Path
from suite.value import value
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
out = parser.parse_args().out
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
for name in "ab":
    if not (out / f"{{name}}.json").exists():
        with open("runs.txt", "a") as file:
            file.write(name)
        metrics = {{"value": value(name), "step_seconds": time.time(), "verdict": "holds"}}
        record = {{"settings": {{"name": name}}, "metrics": metrics, "provenance": {MADE!r} | {{"commit": commit}}}}
        (out / f"{{name}}.json").write_text(json.dumps(record))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one product of two records, whose code has changed since, to the value that is asked for."""
    root = tmp_path / "project"
    git = repository(
        root, {"analysis/__init__.py": "", "analysis/fake.py": SCRIPT, "suite/__init__.py": "", ".gitignore": "results"}
    )
    for module in ("suite.records", "report.rerun"):
        monkeypatch.setattr(f"{module}.ROOT", root)
    monkeypatch.setattr(verify, "History", lambda: History(root))
    monkeypatch.setattr(results_index, "PRODUCTS", (Product("Fig. 0", "?", (), ("theory/*.json",), "fake"),))
    folder = root / "results" / "theory"
    folder.mkdir(parents=True)
    first = git("rev-parse", "HEAD")
    for name in "ab":
        record = {"settings": {"name": name}, "metrics": {"value": 0.5, "step_seconds": 1.0, "verdict": "holds"}}
        (folder / f"{name}.json").write_text(json.dumps(record | {"provenance": MADE | {"commit": first}}))

    def change(code):
        (root / "suite" / "value.py").write_text(f"def value(name):\n    {code}\n")
        return committed(git)

    return root / "results", change


def ran(results):
    path = results.parent / "runs.txt"
    return path.read_text() if path.exists() else ""


def mark(results):
    (row,) = rows(results, History(results.parent))
    return row.code()


def test_identical(project, capsys):
    results, change = project
    commit = change("return 0.5")
    assert mark(results) == "**changed since**"
    verify.main(Config(1, results=results))
    (outcome,) = read_outcomes(results)
    assert (outcome.commit, outcome.device, outcome.differences, outcome.tolerance) == (commit, "chip", {}, 0.0)
    assert outcome.compared == 3 and len(ran(results)) == 1  # neither the time nor the other record
    assert mark(results) == f"**changed since**; 1 of 2 run again at {commit[:10]}: identical"
    assert "identical (3 leaves" in capsys.readouterr().out
    verify.main(Config(2, results=results))  # goes on
    assert sorted(ran(results)) == ["a", "b"]
    assert mark(results) == f"**changed since**; 2 of 2 run again at {commit[:10]}: identical"


def test_what_was_made_again_is_not_made_again(project, capsys):
    results, change = project
    commit = change("return 0.5")
    verify.main(Config(2, results=results))
    change("return 0.5  # for a reason")
    verify.main(Config(2, results=results))
    assert (
        len(ran(results)) == 2
        and f"theory/a.json: identical, as made again at {commit[:10]}." in capsys.readouterr().out
    )
    change("return 0.25 + 0.25")
    assert mark(results).endswith(f"2 of 2 run again at {commit[:10]}, before other changes: identical")
    verify.main(Config(1, results=results))
    assert len(ran(results)) == 3 and len(read_outcomes(results)) == 3


def test_an_outcome_is_of_one_record(project):
    """A new record of the same name has not been made again."""
    results, change = project
    change("return 0.5")
    verify.main(Config(2, results=results))
    path = results / "theory" / "a.json"
    path.write_text(path.read_text().replace("2026-01-01", "2026-01-02"))
    assert "; 1 of 2 run again" in mark(results)


def test_a_difference_ends_with_status_1(project, capsys):
    results, change = project
    change("return 0.5 + 1e-9")
    with pytest.raises(SystemExit, match=r"error: 1 of 1 are not what they were: theory/[ab]\.json"):
        run_main(verify.main, Config, "", {RuntimeError: ""}, ["1", "--results", str(results)])
    assert "DIFFERENT: largest difference 2e-09 (`value`)" in capsys.readouterr().out
    assert mark(results).endswith(": **largest difference 2e-09 (`value`)**")
    with pytest.raises(RuntimeError, match="1 of 1 are not"):  # nor is it forgotten
        verify.main(Config(1, results=results))
    assert len(ran(results)) == 1


@pytest.mark.parametrize(("value", "holds"), [(0.5004, True), (0.502, False)])
def test_another_processor_may_round_otherwise(project, value, holds):
    results, change = project
    for path in (results / "theory").iterdir():
        path.write_text(path.read_text().replace('"chip"', '"other chip"'))
    change(f"return {value}")
    if holds:
        verify.main(Config(1, results=results))
    else:
        with pytest.raises(RuntimeError, match="1 of 1 are not what they were"):
            verify.main(Config(1, results=results))
    (outcome,) = read_outcomes(results)
    assert outcome.holds is holds and outcome.tolerance == 1e-3
    assert mark(results).endswith("`value`)" if holds else "`value`)**")


def test_what_fails_or_takes_too_long_is_told_and_not_kept(project, capsys):
    results, change = project
    change("raise ValueError('no value')")
    with pytest.raises(RuntimeError, match="1 of 1 are not what they were"):
        verify.main(Config(1, results=results))
    assert "cannot be made any more: exit code 1, ValueError: no value." in capsys.readouterr().out
    change("import time; time.sleep(60)")
    verify.main(Config(1, results=results, minutes=0.01))
    assert "not finished within 1 s, the share of --minutes." in capsys.readouterr().out
    assert not (results / FILE).exists()


def test_bad_settings(project):
    results, change = project
    change("return 0.5")
    with pytest.raises(ValueError, match="nothing with records is called Table 9"):
        verify.main(Config(results=results, products=("Fig. 0", "Table 9")))
    with pytest.raises(ValueError, match=r"at least 1, --minutes positive .* got 0, None and 0\.001"):
        verify.main(Config(0, results=results))
    (results.parent / "suite" / "value.py").write_text("")
    with pytest.raises(ValueError, match="commit your changes first"):
        verify.main(Config(results=results))


def record(settings=None, metrics=None, **made):
    return Record(ROOT / "results" / "theory" / "a.json", settings or {}, metrics or {}, MADE | made)


def test_leaves():
    old = record(
        {"size": [1, 2], "code": "x"},
        {"error": [1.0, 1e-9], "mean": {"0": 4.0, "1": 5.0}, "evidence": "held 3 of 4", "none": None, "empty": [],
         "call_seconds": {"a": 1}, "relative_seconds": 2.0, "parity": 1e-7},
    )  # fmt: skip
    assert compare(old, old) == (11, {})
    other = {"code": "y", "evidence": "held 2 of 4", "call_seconds": {"a": 2}, "new": 3}
    assert compare(old, replace(old, settings=old.settings | {"code": "y"}, metrics=old.metrics | other)) == (11, {})
    rounding = {"error": [1.0, 2e-9], "parity": 3e-7}
    _, found = compare(old, replace(old, metrics=old.metrics | rounding))
    assert found == pytest.approx({"error": 1e-7, "parity": 2e-4})
    wrong = {"mean": {"0": 4.0, "1": 4.0}, "relative_seconds": 1.0, "evidence": "none of 4", "none": 1.0}
    _, found = compare(old, replace(old, settings={"size": [1]}, metrics=old.metrics | wrong))
    assert found == {"mean": 0.2, "relative_seconds": 0.5, "evidence": None, "none": None, "size": None}


def test_obstacles(tmp_path):
    assert obstacle(record(), None) is None
    assert "measured on a GPU (H200)" in obstacle(record(cuda="13", device="H200"), None)
    assert "no single record (python x.py)" in obstacle(record(command="python x.py"), None)
    assert "snapshots" in obstacle(record({"vae": "snapshot step-1"}), None)
    assert "from a hub (a/b)" in obstacle(record({"pretrained": "a/b"}), None)
    times = replace(record(), path=ROOT / "results" / "time" / "a.json")
    assert "nothing but times" in obstacle(times, None)
    filmed = record({"clips": ["bikes.mp4", "mine.mp4"]}, command="python analysis/a.py --clips films")
    assert obstacle(filmed, None) == obstacle(filmed, tmp_path) == "needs --clips with mine.mp4"
    (tmp_path / "mine.mp4").touch()
    assert obstacle(filmed, tmp_path) is None


def test_every_committed_record_is_made_by_a_known_command(tmp_path):
    left_out = set()
    for path in (ROOT / "results").rglob("*.json"):
        found = read_record(path)
        reason = obstacle(found, None)
        if reason is None or "--clips" in reason:
            assert all(isinstance(word, str) for word in script(found).options(found))
        else:
            left_out.add(reason.split(" ")[0])
    assert left_out <= {"was", "holds", "needs"}
