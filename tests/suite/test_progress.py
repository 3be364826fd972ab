"""Progress is seen with a terminal and without one, and says nothing where nothing is worth saying."""

import pytest

from suite import progress
from suite.progress import Bar, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_without_a_terminal(clock, capsys):
    for _ in track(range(6), "clips"):
        clock[0] += 4
    told = capsys.readouterr().err.splitlines()
    assert told == ["clips: 3 of 6, 0:12, 0:12 left", "clips: 6 of 6, 0:24"]


def test_short_work_says_nothing(clock, capsys):
    assert list(track(range(9), "clips")) == list(range(9))
    assert capsys.readouterr().err == ""


def test_what_was_done_before_is_not_counted_as_fast(clock, capsys):
    with Bar("training", 1000, done=900) as bar:
        clock[0] += 3700
        bar.advance(50, note="mse 0.1")
    assert capsys.readouterr().err.splitlines()[0] == "training: 950 of 1000, 1:01:40, 1:01:40 left, mse 0.1"


def test_a_length_that_is_not_known(clock, capsys):
    def items():
        for k in range(3):
            clock[0] += 11
            yield k

    assert list(track(items(), "films")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == ["films: 1, 0:11", "films: 2, 0:22", "films: 3, 0:33"]


def test_what_is_being_done_is_said_at_once(clock, capsys):
    with Bar("restoring", 3) as bar:
        bar.say("encoding 9 frames")
    assert capsys.readouterr().err.splitlines()[0] == "restoring: 0 of 3, 0:00, encoding 9 frames"


def test_one_process_of_several_speaks(clock, capsys):
    with Bar("training", 2, shown=False) as bar:
        bar.say("x")
        clock[0] += 20
        bar.advance()
    assert capsys.readouterr().err == ""


def test_an_error_is_not_followed_by_a_line(clock, capsys):
    with pytest.raises(KeyError), Bar("training", 2) as bar:
        clock[0] += 20
        bar.advance()
        raise KeyError
    assert capsys.readouterr().err.splitlines() == ["training: 1 of 2, 0:20, 0:20 left"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert list(track(range(4), "clips")) == [0, 1, 2, 3]
    assert "4/4" in capsys.readouterr().err
