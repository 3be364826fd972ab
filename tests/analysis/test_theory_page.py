"""The report: one row a claim from the records, and ``python -m analysis`` that makes them."""

import json
import sys

import pytest

from analysis import __main__ as job
from analysis.theory_page import report, write_report
from suite.records import write_record


def record(folder, name, *claims, **settings):
    made_by = {"command": f"python analysis/{name}.py --full", "commit": "a" * 40, "dirty": False}
    made_by |= {"date": "2026-01-02T03:04:05Z"}
    write_record(folder / f"{name}.json", settings, {"claims": list(claims)}, made_by)


def claim(statement="S", source="Sec. 3.2", verdict="holds", evidence="1 [0, 2]"):
    return {"statement": statement, "source": source, "verdict": verdict, "evidence": evidence}


def rows(text):
    table = text.split("## How each")[0]
    return [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]


DECAY, SPACE = "Influence decays exponentially with temporal distance", "The gradient of a pixel is local in space"


def test_every_claim_is_a_row_with_all_that_belongs_to_it(tmp_path):
    folder = tmp_path / "theory"
    record(folder, "b", claim("ours first in its file", "ours"), claim("|x| <= C", "Fig. 3", "fails", "0.5"))
    record(folder, "a-easy-case", claim(f"{SPACE}.", verdict="holds with correction"))
    record(folder, "none")
    (folder / "b.png").write_bytes(b"")
    path = write_report(folder)
    assert path == tmp_path / "theory.md"
    text = path.read_text()
    found = rows(text)
    assert [row[0] for row in found] == ["| 1", "| 2", "| 3"]
    assert [row[1] for row in found] == [
        f"{SPACE}.",
        "\\|x\\| <= C",
        "ours first in its file",
    ]  # the paper's come first
    assert [row[2] for row in found] == ["easy-case", "", ""]
    assert [row[3] for row in found] == ["Sec. 3.2", "Fig. 3", ""]
    assert [row[4] for row in found] == ["**holds with correction**", "**fails**", "**holds**"]
    assert [row[5] for row in found] == ["1 [0, 2]", "0.5", "1 [0, 2]"]
    assert found[1][6].startswith("analysis/b.py, [record](theory/b.json)")
    assert "Of 3 rows 1 hold, 1 hold with correction, 1 fail." in text
    assert "| [b](theory/b.json) | `python analysis/b.py --full` |" in text
    assert "![b](theory/b.png)" in text
    assert text.count("aaaaaaaaaa") == 3
    assert "uncommitted" not in text
    assert text.index("## Is the gradient local in space?") < text.index("## Other statements") < text.index("![b]")


def test_the_page_opens_with_what_became_of_the_paper_and_goes_on_by_question(tmp_path):
    folder = tmp_path / "theory"
    record(folder, "space", claim(f"{SPACE} (wan2.1).", "Fig. 7", "fails", "share within 4 cells 0.5"), vae="wan2.1")
    decays = [claim(f"{DECAY} ({k}).", "Fig. 3", verdict) for k, verdict in enumerate(("holds", "fails"))]
    record(folder, "decay", *decays, claim("Temporal locality: there are C, alpha > 0"), vae="cogvideox")
    for name in ("spatial_locality", "temporal_locality"):
        (folder / f"{name}.png").write_bytes(b"")
    text = write_report(folder).read_text()
    title, introduction, table = text.split("\n\n")[:3]
    assert title.startswith("# ") and introduction.count("\n") == 1
    assert [line.split(" | ")[1:4] for line in table.splitlines()[2:]] == [
        ["", "**holds** 2 of 3, **fails** 1", ""],
        ["**fails**", "", ""],
    ]
    assert "[Is the gradient local in space?](#is-the-gradient-local-in-space)" in table
    parts = ["## Symbols", "## Does influence decay", "(theory/temporal_locality.png)", "| 1 | Temporal", "| 2 | Influ",
             "## Is the gradient local", "(theory/spatial_locality.png)", "| 4 |", "## How each record"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "## Are there better estimators" not in text  # nothing to say


def test_what_cannot_be_reported_is_refused(tmp_path):
    folder = tmp_path / "theory"
    record(folder, "none")
    with pytest.raises(ValueError, match="No record in 'theory' makes a claim"):
        report(folder)
    record(folder, "bad", claim(verdict="probably"))
    with pytest.raises(ValueError, match=r"'bad.json' holds a claim.*probably"):
        report(folder)


def test_the_job_runs_what_is_there_and_fails_for_what_is_not(tmp_path, monkeypatch, capfd):
    root = tmp_path / "root"
    (root / "analysis").mkdir(parents=True)
    script = (
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir(parents=True, exist_ok=True)\n"
        "name = pathlib.Path(sys.argv[0]).stem\n"
        "claim = {'statement': name, 'source': 'ours', 'verdict': 'holds', 'evidence': ' '.join(sys.argv[3:])}\n"
        "made = {'command': name, 'commit': None, 'dirty': None, 'date': '2026-01-01T00:00:00Z'}\n"
        "record = {'settings': {}, 'metrics': {'claims': [claim]}, 'provenance': made}\n"
        "(out / f'{name}.json').write_text(json.dumps(record))\n"
    )
    for name in ("toy_checks", "temporal_locality"):
        (root / "analysis" / f"{name}.py").write_text(script)
    (root / "analysis" / "error_bound.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(job, "ROOT", root)
    (tmp_path / "clips").mkdir()
    config = job.Config(full=True, out=tmp_path / "out", clips=tmp_path / "clips")
    with pytest.raises(SystemExit) as stopped:
        job.main(config)
    assert "error_bound.py ended with status 3" in str(stopped.value)
    assert "backbone_gradient.py is missing" in str(stopped.value)
    assert "toy_checks" not in str(stopped.value)
    found = {
        json.loads(p.read_text())["metrics"]["claims"][0]["statement"]: p for p in (tmp_path / "out").glob("*.json")
    }
    assert set(found) == {"toy_checks", "temporal_locality"}
    given = {k: json.loads(p.read_text())["metrics"]["claims"][0]["evidence"] for k, p in found.items()}
    assert given["toy_checks"] == "--full"
    assert given["temporal_locality"] == f"--full --clips {(tmp_path / 'clips').resolve()}"
    assert len(rows((tmp_path / "out.md").read_text())) == 2
    assert "== temporal_locality" in capfd.readouterr().out
    job.main(job.Config(out=tmp_path / "some", only=("toy_checks",)))  # nothing missing among these
    assert sys.executable


def test_the_job_refuses_bad_input_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"--only takes toy_checks.*got fun"):
        job.main(job.Config(only=("fun",)))
    with pytest.raises(NotADirectoryError, match="--snapshots must be a folder"):
        job.main(job.Config(snapshots=tmp_path / "absent"))
