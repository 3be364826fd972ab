"""The table of video VAEs: complete for the installed diffusers, and measured."""

from pathlib import Path

import pytest

from chopgrad import DECODERS
from report.docs import classes

PAGE = Path(__file__).parents[3] / "docs" / "decoders.md"
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if "|" in line]
BY_CLASS = {(line[0].strip("`"), line[1]): line for line in LINES}


def test_no_autoencoder_of_diffusers_is_left_out():
    assert not classes.unlisted()
    assert set(DECODERS) <= {row.name for row in classes.ROWS}
    assert {(row.name, row.models) for row in classes.ROWS} <= set(BY_CLASS)


def test_one_that_appears_is_noticed(monkeypatch):
    monkeypatch.setattr(classes, "classes", lambda: {"AutoencoderKLWan", "AutoencoderKLTomorrow"})
    assert classes.unlisted() == {"AutoencoderKLTomorrow"}
    with pytest.raises(ValueError, match="lacks: AutoencoderKLTomorrow"):
        classes.main(classes.Config())


@pytest.mark.parametrize("models", ["EasyAnimate", "HunyuanVideo", "Qwen-Image 2.1", "Cosmos"])
def test_a_line_is_what_is_measured(models):
    row = next(row for row in classes.ROWS if row.models == models)
    assert [*classes.cells(row)] == BY_CLASS[row.name, models]


@pytest.mark.slow
@pytest.mark.parametrize("row", classes.ROWS, ids=lambda row: row.models)
def test_every_line_is_what_is_measured(row):
    assert [*classes.cells(row)] == BY_CLASS[row.name, row.models]
