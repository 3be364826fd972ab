"""Result records: written whole or not at all, read with care, and free of what belongs to one machine."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from suite import records
from suite.records import ROOT, provenance, read_record, read_records, write_record
from tests.repository import repository, write

GOOD = {"settings": {"seed": 0}, "metrics": {"peak_bytes": 1}, "provenance": {"command": "python x.py"}}


def test_round_trip(tmp_path):
    path = write_record(tmp_path / "area" / "case.json", *GOOD.values())
    record = read_record(path)
    assert (record.settings, record.metrics, record.provenance) == tuple(GOOD.values())
    assert [p.name for p in path.parent.iterdir()] == ["case.json"]


def test_the_file_in_place_is_the_old_one_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = write_record(tmp_path / "case.json", *GOOD.values())
    replace, seen = os.replace, []

    def watched(new, old):
        seen.extend(read_record(Path(p)).metrics for p in (new, old))
        replace(new, old)

    monkeypatch.setattr(os, "replace", watched)
    write_record(path, {}, {"peak_bytes": 2}, {})
    assert seen == [{"peak_bytes": 2}, {"peak_bytes": 1}]
    assert read_record(path).metrics == {"peak_bytes": 2}


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_record(tmp_path / "case.json", *GOOD.values())
    fdopen = os.fdopen

    class Full:
        def __init__(self, *args):
            self.file = fdopen(*args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", Full)
    with pytest.raises(OSError, match="No space left"):
        write_record(path, {}, {"peak_bytes": 2}, {})
    assert read_record(path).metrics == GOOD["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["case.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path, value):
    path = write_record(tmp_path / "case.json", *GOOD.values())
    with pytest.raises(ValueError, match=r"Record 'case.json' holds a number that is not finite"):
        write_record(path, {}, {"psnr_db": value}, {})
    assert read_record(path).metrics == GOOD["metrics"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_record(tmp_path / "case.json", *GOOD.values())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, {}, {"peak_bytes": 2}, {})
    assert read_record(path).metrics == GOOD["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["case.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(GOOD)[:-20], "not readable JSON"),
        ("[1, 2]", "not a result record"),
        (json.dumps({"settings": {}, "metrics": {}}), "it needs the objects settings, metrics, provenance"),
        (json.dumps({**GOOD, "metrics": 1}), "not a result record"),
        ("\x00\xff", "not readable JSON"),
    ],
)
def test_half_written_and_foreign_files_are_reported_and_skipped(tmp_path, text, reason):
    write_record(tmp_path / "good.json", *GOOD.values())
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=rf"skipped: 'bad.json' is not .*{reason.removeprefix('not ')}") as reports:
        found = list(read_records(tmp_path))
    assert len(reports) == 1
    assert [r.path.name for r in found] == ["good.json"]


def test_provenance_names_code_and_machine_but_no_path_and_no_host(monkeypatch):
    inside, outside = ROOT / "results" / "x.json", "/somewhere/private/clips"
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "analysis" / "a.py"), "--out", str(inside), f"--clips={outside}", "../aside/vae"]
    )
    made_by = provenance()
    assert made_by["command"] == "python analysis/a.py --out results/x.json --clips=clips vae"
    keys = {
        "command",
        "commit",
        "dirty",
        "date",
        "python",
        "torch",
        "diffusers",
        "cuda",
        "device",
        "threads",
        "chopgrad",
    }
    assert set(made_by) == keys
    text = json.dumps(made_by)
    assert str(ROOT) not in text
    assert "/somewhere" not in text
    assert socket.gethostname() not in text


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("suite/a.py", True),
        ("constraints.txt", True),
        ("suite/new.py", True),
        ("report/deeper/new.py", True),
        ("note.txt", False),
        ("weights/clip.mp4", False),
        ("runs/a.py", False),
        ("suite/ignored/a.py", False),
        ("results/old.json", False),
        ("results/new.json", False),
    ],
)
def test_what_makes_code_uncommitted(tmp_path, monkeypatch, name, dirty):
    """Tracked files and importable sources do; results, ignored files, notes and clips do not."""
    ignored = {".gitignore": "runs/\nignored/\n"}
    git = repository(tmp_path, ignored | dict.fromkeys(("suite/a.py", "constraints.txt", "results/old.json"), "0\n"))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    commit = git("rev-parse", "HEAD")
    assert (provenance()["commit"], provenance()["dirty"]) == (commit, False)
    write(tmp_path, {name: "1\n"})
    assert (provenance()["commit"], provenance()["dirty"]) == (commit, dirty)


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_a_module_is_named_as_it_is_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench" / "__main__.py"), "--rounds", "2"])
    assert provenance()["command"] == "python -m bench --rounds 2"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench" / "__main__.py")])
    assert provenance()["command"] == "python -m bench"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["x.py", "--clips=/private/holiday=2024"], "x.py --clips=holiday=2024"),
        (["x.py", "/private/holiday=2024"], "x.py holiday=2024"),
        (["x.py", "--set", "a=b=/private/clips"], "x.py --set a=b=clips"),
        (["x.py", "--lr=0.1", "--vae", "owner/name"], "x.py --lr=0.1 --vae owner/name"),
        (["x.py", "--clips", "/private/my videos"], "x.py --clips 'my videos'"),
        (["/private/env/pytest/__main__.py", "-q"], "-m pytest -q"),
        ([str(ROOT / "bench" / "__main__.py")], "-m bench"),
    ],
)
def test_the_command_shows_no_path_of_the_machine(monkeypatch, words, shown):
    monkeypatch.setattr(sys, "argv", words)
    assert provenance()["command"] == f"python {shown}"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("c" * 40, ("c" * 40, False)),
        ("c" * 40 + "-dirty", ("c" * 40, True)),
        ("abc", (None, None)),
        ("main", (None, None)),
        (None, (None, None)),
    ],
)
def test_without_git_the_environment_may_tell_the_commit(given, found, monkeypatch):
    monkeypatch.setattr(records, "git", lambda *words: None)
    monkeypatch.delenv("CHOPGRAD_COMMIT", raising=False)
    if given is not None:
        monkeypatch.setenv("CHOPGRAD_COMMIT", given)
    made_by = provenance()
    assert (made_by["commit"], made_by["dirty"]) == found


@pytest.mark.parametrize(("top", "found"), [(str(ROOT), "d" * 40), ("/elsewhere", "c" * 40)])
def test_git_knows_better_than_the_environment_unless_it_is_another_repository(top, found, monkeypatch):
    answers = {"HEAD": "d" * 40 + "\n", "--show-toplevel": top + "\n"}
    monkeypatch.setenv("CHOPGRAD_COMMIT", "c" * 40)
    monkeypatch.setattr(
        records, "git", lambda root, *words: answers.get(words[-1], "") if words[0] == "rev-parse" else ""
    )
    assert provenance()["commit"] == found
