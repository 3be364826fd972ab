"""The paper's statements on memory and time: they can hold, fail, and be left open."""

import pytest

from bench.cases import Case
from bench.page.results import Results
from bench.page.scaling import claims
from bench.selection import PAPER
from chopgrad import Chop, Full
from suite.records import provenance, write_record

MADE_BY = provenance() | {"dirty": False}


def found(folder, peak, time=lambda frames, d: None, lengths=(25, 193), vae="wan2.1", methods=PAPER):
    """Claims of records whose numbers are functions of the length and the distance."""
    cases = [Case(vae, n, 16, 16, m) for n in lengths for m in (Full(), *methods)]
    for case in cases:
        d = getattr(case.strategy, "distance", None)
        memory = {"out_of_memory": False, "peak_bytes": peak(case.frames, d), "weights_bytes": 0, "latents_bytes": 0}
        write_record(folder / "memory" / f"{case.name}.json", case.settings(), memory, MADE_BY)
        if d is not None and (mean := time(case.frames, d)):
            ratio = {"ratio_to_reference": [mean] * 3, "reference": "Full()", "seconds_median": 1.0}
            write_record(folder / "time" / f"{case.name}.json", case.settings(), {"out_of_memory": False, **ratio},
                         MADE_BY)  # fmt: skip
    judged = claims(Results(folder, cases))[vae]
    assert all(c.source == "Fig. 6" for c in judged)
    return {c.statement.removesuffix(f" ({vae})."): c for c in judged}


DISTANCE, LENGTH, TIME = (
    "Peak memory is linear in the truncation distance",
    "Peak memory does not depend on the length of the video",
    "Time is linear in the truncation distance",
)


def as_the_paper_says(frames, d):
    return 100 * frames if d is None else 1000 + 500 * d


def test_what_the_paper_says_holds(tmp_path):
    judged = found(tmp_path, as_the_paper_says, lambda frames, d: 1 + 0.5 * d)
    assert [(name, c.verdict) for name, c in judged.items()] == [(x, "holds") for x in (DISTANCE, LENGTH, TIME)]
    assert judged[DISTANCE].evidence.startswith("R^2 of a line 1.000: D=0")
    assert "193 frames" in judged[DISTANCE].evidence  # the longest video
    assert judged[LENGTH].evidence == (
        "peak at 193 over that at 25 frames of 16x16: D=0 1.000, D=1 1.000, D=2 1.000, D=4 1.000; Full() 7.72"
    )
    assert "D=4 3.00 [3.00, 3.00] of the time of Full() at 193 frames" in judged[TIME].evidence


@pytest.mark.parametrize(
    ("peak", "time", "failing"),
    [
        (lambda n, d: 1000 + (0 if d is None else 10 * 2**(2 * d)), lambda n, d: 1 + d, DISTANCE),
        (lambda n, d: (10 * n if d is None else 1000 + 500 * d) + 2 * n, lambda n, d: 1 + d, LENGTH),
        (as_the_paper_says, lambda n, d: 3 - 2 * 0.2**d, TIME),
    ],
)  # fmt: skip
def test_each_statement_can_fail(tmp_path, peak, time, failing):
    judged = found(tmp_path, peak, time)
    assert {name: c.verdict for name, c in judged.items()} == {
        name: "fails" if name == failing else "holds" for name in (DISTANCE, LENGTH, TIME)
    }


def test_distances_that_reach_over_the_whole_video_do_not_count(tmp_path):
    """CogVideoX's 25 frames are 3 groups, so from D = 2 on nothing is cut there."""
    levels_off = lambda n, d: 10 * n if d is None else 1000 + 500 * (min(d, 2) if n == 25 else d)  # noqa: E731
    judged = found(tmp_path, levels_off, lengths=(25, 65), vae="cogvideox")
    assert [c.verdict for c in judged.values()] == ["holds", "holds"]
    assert "D=0 1.000, D=1 1.000; Full() 2.60" in judged[LENGTH].evidence
    assert found(tmp_path / "short", levels_off, lengths=(25,), vae="cogvideox") == {}


def test_too_little_is_not_judged(tmp_path):
    assert found(tmp_path / "a", as_the_paper_says, methods=(Chop(0), Chop(1)), lengths=(25,)) == {}  # two points
    assert set(found(tmp_path / "b", as_the_paper_says, methods=(Chop(0), Chop(1)))) == {LENGTH}
    assert set(found(tmp_path / "c", as_the_paper_says, lengths=(97, 193))) == {DISTANCE}  # less than twice as long
    assert claims(Results(tmp_path / "nowhere", [])) == {}
