"""The index of the results: every record has its place, and the page is what the records say."""

import json
import shutil

import pytest

from report import results_index
from report.freshness import History
from report.products import PRODUCTS
from report.results_index import Config, differences, page, reasons, rows
from suite.records import ROOT, read_record

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def history():
    """That of the project, whose commits are compared once."""
    return History()


@pytest.fixture(scope="module")
def listed(history):
    return rows(RESULTS, history)


def test_every_record_depends_on_the_library(history, listed):
    for row in listed:
        for record in row.records:
            assert "chopgrad/__init__.py" in history.dependencies(record), record.path.name


def test_the_page_is_up_to_date(history):
    assert differences(RESULTS, history, marks=False) == [], "run python -m report.results_index"


def test_every_record_has_its_place(listed):
    assert [row.product.records for row in listed if row.records and not row.product.question] == []
    counted = [record.path for row in listed for record in row.records]
    assert len(counted) == len(set(counted)) == len(list(RESULTS.rglob("*.json")))


def test_a_product_without_records_is_named_as_missing(tmp_path, history):
    (tmp_path / "theory").mkdir()
    shutil.copy(RESULTS / "theory" / "toys.json", tmp_path / "theory")
    (tmp_path / "new").mkdir()
    shutil.copy(RESULTS / "theory" / "toys.json", tmp_path / "new" / "a.json")
    (tmp_path / "broken.json").write_text("{")
    text = page(tmp_path, rows(tmp_path, history))
    made, missing = text.split("## Not measured yet")
    assert "| [theory/toys.json](theory/toys.json) | 1 |" in made and "`new/*.json` | 1 |" in made
    assert missing.count("\n- ") == len(PRODUCTS) - 1
    assert read_record(tmp_path / "new" / "a.json").provenance["commit"][:10] in made


def test_check_and_why(tmp_path, capsys, history, monkeypatch):
    monkeypatch.setattr(results_index, "History", lambda: history)
    shutil.copytree(RESULTS / "reconstruction", tmp_path / "reconstruction")
    path = tmp_path / "reconstruction" / "cogvideox.json"
    record = json.loads(path.read_text())
    # Made by uncommitted code on a commit after which the library changed.
    record["provenance"] |= {"dirty": True, "commit": "5c1234cd30f3286d170190e1cb391c740c40ba50"}
    path.write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"README\.md is not what the records say: run python -m report\.results_index"
    ):
        results_index.main(Config(check=True, results=tmp_path))
    results_index.main(Config(results=tmp_path))
    results_index.main(Config(check=True, results=tmp_path))
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("| 2 |", "| 3 |"))
    with pytest.raises(ValueError, match=r"-\| ours.*\| 3 \|"):
        results_index.main(Config(check=True, results=tmp_path))
    capsys.readouterr()
    results_index.main(Config(why=True, results=tmp_path))
    word = "made by uncommitted code: chopgrad/" if history.known else "unknown: no file"
    assert f"reconstruction/*.json: {1 if history.known else 2} {word}" in capsys.readouterr().out
    assert len(reasons(rows(tmp_path, history))) >= 1
    with pytest.raises(NotADirectoryError, match="'none' is not a folder"):
        results_index.main(Config(results=tmp_path / "none"))


def test_an_archive_without_git_checks_all_but_the_marks(tmp_path, history, monkeypatch):
    monkeypatch.setattr(results_index, "History", lambda: history)
    shutil.copytree(RESULTS / "reconstruction", tmp_path / "reconstruction")
    results_index.main(Config(results=tmp_path))
    nowhere = History(tmp_path)
    assert not nowhere.known and differences(tmp_path, nowhere) == []
    (tmp_path / "reconstruction" / "wan2.1.json").unlink()
    assert differences(tmp_path, nowhere) != []
