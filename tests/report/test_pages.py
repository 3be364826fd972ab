"""The committed tables say what the committed records say."""

import shutil

import pytest

from report.pages import Config, main, pages
from suite.records import ROOT

RESULTS = ROOT / "results"
KNOWN = pages(RESULTS)


@pytest.mark.parametrize("name", KNOWN)
def test_a_page_is_what_its_records_say(name):
    assert KNOWN[name]() == (RESULTS / name).read_text(), "run python -m report.pages"


def test_all_pages_are_known():
    """But for those that are written together with their one record, and the index."""
    alone = ("gradient_bias/", "reconstruction/")
    written = {str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.md")} - {"README.md"}
    assert {name for name in written if not name.startswith(alone)} == set(KNOWN)


def test_pages_are_written_again(tmp_path, capsys):
    # The theory's page names claims of the others.
    for name in ("theory", "memory", "time", "published", "tasks", "lost_psnr"):
        shutil.copytree(RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("*.md"))
    main(Config(tmp_path))
    written = capsys.readouterr().out
    for name in ("theory.md", "tasks/README.md", "lost_psnr/README.md"):
        assert name in written
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()
    with pytest.raises(ValueError, match="--results must be a folder of records, but 'nothing' has none"):
        main(Config(tmp_path / "nothing"))
