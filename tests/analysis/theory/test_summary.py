"""The table that opens the theory's page: no claim of the paper is left out, and no row and no word of it is stale."""

from collections import Counter

import pytest

from analysis.theory import summary as module
from analysis.theory.elsewhere import from_elsewhere
from analysis.theory.questions import QUESTIONS, REST, anchor, question_of, question_of_figure
from analysis.theory.summary import (
    HEADER,
    PAPER,
    PaperClaim,
    Trial,
    column_of,
    corrected,
    everywhere,
    numbers,
    summary,
    word,
)
from analysis.theory_page import claims_of
from suite.claims import Claim
from suite.records import ROOT, read_records

RESULTS = ROOT / "results"
WAN, COGVIDEOX, OTHERS = HEADER[1:4]


@pytest.fixture(scope="module")
def committed():
    """Claims of the theory's records, and those from elsewhere."""
    theory = [claim for claim, _ in claims_of(list(read_records(RESULTS / "theory")))]
    return theory, list(from_elsewhere(RESULTS))


def claim(statement, verdict="holds", evidence="", source="Sec. 3.2"):
    return Claim(statement, source, verdict, evidence)


def test_every_claim_of_the_paper_in_a_record_belongs_to_one_row(committed):
    theory, elsewhere = committed
    for found in (*theory, *(t.claim for t in elsewhere)):
        rows = [row.says for row in PAPER if row.covers(found)]
        assert len(rows) == (found.source != "ours"), found.statement


def test_every_row_has_a_claim_and_every_word_of_it_a_use(committed):
    theory, elsewhere = committed
    everything = [*theory, *(t.claim for t in elsewhere)]
    assert 10 <= len(PAPER) <= 15
    for row in PAPER:
        for start in row.statements:
            assert [c for c in everything if row.covers(c) and c.statement.startswith(start)], start
        mine = [c for c in everything if row.covers(c)]
        assert row.remarks and all(remark(mine) for remark in row.remarks), row.says


def test_every_statement_and_figure_answers_one_question(committed):
    theory, _ = committed
    assert [c.statement for c in theory if question_of(c.statement) is REST] == []
    pictures = [p.stem for p in (RESULTS / "theory").glob("*.png")]
    assert [p for p in pictures if question_of_figure(p) is REST] == []
    for question in QUESTIONS:
        for k, start in enumerate(question.statements):
            assert any(question.place(c.statement) == k for c in theory), start
        assert all(any(p.startswith(f) for p in pictures) for f in question.figures)
    taken = Counter(q.heading for c in theory for q in QUESTIONS if q.place(c.statement) is not None)
    assert taken.total() == len(theory)  # none answers two


def test_benchmark_and_end_tasks_say_what_becomes_of_their_claims(committed):
    _, elsewhere = committed
    sources = Counter(t.claim.source for t in elsewhere)
    assert sources["Fig. 6"] >= 6 and {"Table 1", "Table 2", "Table 3", "Table 4"} < set(sources)
    assert {column_of(t.vae) for t in elsewhere} <= {WAN, COGVIDEOX, OTHERS}
    for link in {t.link.partition("](")[2].rstrip(")") for t in elsewhere}:
        name, _, heading = link.partition("#")
        text = (RESULTS / name).read_text()
        assert not heading or heading in {anchor(x.lstrip("# ")) for x in text.splitlines() if x.startswith("#")}
    assert list(from_elsewhere(ROOT / "docs")) == []  # no records there


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        ([], ""),
        (["fails"], "**fails**"),
        (["holds with correction"] * 3, "**holds with correction**"),
        (["fails", "fails", "holds", "fails"], "**holds** 1 of 4, **fails** 3"),
        (["undecided", "fails", "undecided", "fails"], "**fails** 2 of 4, **undecided** 2"),
    ],
)
def test_verdicts_of_several_cases(verdicts, told):
    assert word(verdicts) == told


@pytest.mark.parametrize(
    ("vae", "column"),
    [
        ("wan2.1", WAN), ("full:wan2.1", WAN), ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", WAN), ("cogvideox", COGVIDEOX),
        ("THUDM/CogVideoX-2b", COGVIDEOX), ("wan2.2", OTHERS), ("", OTHERS),
    ],
)  # fmt: skip
def test_columns(vae, column):
    assert column_of(vae) == column


def test_a_row_gathers_its_claims(monkeypatch):
    rows = (
        PaperClaim("A and B", "Fig. 1", ("A is", "B is"), (numbers("x is {}", r"x=(\d+)"), corrected("but"))),
        PaperClaim("C", "Fig. 2", ("C is",)),
        PaperClaim("never tried", "Fig. 3", ("D is",)),
    )
    monkeypatch.setattr(module, "PAPER", rows)
    tried = [
        Trial(claim("A is so", "holds", "x=3"), "wan2.1", "[a](#a)"),
        Trial(claim("A is so", "fails", "x=20"), "wan2.1", "[a](#a)"),
        Trial(claim("B is so", "holds with correction", "x=11"), "", "[b](#b)"),
        Trial(claim("C is so", "undecided"), "cogvideox", "[a](#a)"),
        Trial(claim("C is our own", "holds", source="ours"), "cogvideox", "[c](#c)"),
    ]
    assert summary(tried) == [
        ("A and B (Fig. 1)", "**holds** 1 of 2, **fails** 1", "", "**holds with correction**", "x is 3 to 20; but",
         "[a](#a), [b](#b)"),
        ("C (Fig. 2)", "", "**undecided**", "", "", "[a](#a)"),
    ]  # fmt: skip
    assert summary(tried[3:]) == [("C (Fig. 2)", "", "**undecided**", "", "", "[a](#a)")]


def test_remarks_are_made_of_what_is_there():
    share = numbers("{} %", r"(\d+ \[[^]]*\]) %", of="A")
    assert share([claim("A", evidence="5 [4, 6] %"), claim("B", evidence="1 [0, 2] %")]) == "5 [4, 6] %"
    assert share([claim("A", evidence="nothing")]) == ""
    assert corrected("but")([claim("A", "holds")]) == ""
    won = claim("S in PSNR (one).")
    assert everywhere([won, claim("S in PSNR (other)."), claim("S in LPIPS (VGG) (one).", "undecided")]) == (
        "better in every task: PSNR"
    )
    assert everywhere([won, claim("S in PSNR (other).", "fails")]) == "worse in some: PSNR"
