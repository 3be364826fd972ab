"""The full-size decoders without a GPU: what tells most comes first, and what does not fit is not tried."""

import pytest

from bench import selection, test_time
from bench.__main__ import Config, main, tried
from bench.cases import FULL_SIZE, Case, Whole, frame_groups, measurable, uses_host
from bench.selection import PAPER, Selection, cases, is_predicted, is_timed, stages
from bench.subject import Subject
from chopgrad import Chop, Exact, Full
from suite.records import provenance, read_record, write_record

MADE_BY = provenance() | {"dirty": False}
METHODS = (Full(), Chop(0), Exact(offload=True))


def test_what_tells_most_comes_first():
    first, *later = stages(Selection(published=True))
    assert {(c.vae, c.frames, c.height, c.width) for c in first} == {("full:wan2.1", n, 128, 128) for n in (9, 17)}
    assert first[0].strategy == Full() and {*PAPER, Exact(offload=False), Exact(pieces=True)} <= {
        c.strategy for c in first
    }
    found = [*first, *(c for stage in later for c in stage)]
    assert len({c.name for c in found}) == len(found) and {c.vae for c in found} == set(FULL_SIZE)
    assert {c.dtype for c in found} == {"float32"} and {c.device for c in found} == {"cpu"}
    assert all(is_predicted(c) for c in found)
    timed = [c for c in found if is_timed(c)]
    assert 0 < len(timed) < len(found) and all(measurable(c) for c in timed)
    assert any(isinstance(c.strategy, Whole) for c in timed) and any(uses_host(c.strategy) for c in found)


def test_windows_fit_into_their_videos():
    for case in cases(Selection(published=True)):
        if isinstance(case.strategy, Chop):
            assert case.strategy.distance + case.strategy.block <= frame_groups(FULL_SIZE[case.vae], case.frames)


def test_a_selection_narrows_the_cases():
    chosen = Selection(published=True, vaes=("cogvideox",), sizes=("64x64",), frames=(41,))
    assert Selection.from_json(chosen.to_json()) == chosen
    assert {(c.vae, c.frames, c.height) for c in cases(chosen)} == {("full:cogvideox", 41, 64)}
    with pytest.raises(ValueError, match="No case is left"):
        cases(Selection(published=True, frames=(193,)))


def test_what_is_not_predicted_to_fit_is_not_tried(tmp_path, capsys):
    fits, large, unknown = (Case("full:wan2.1", 9, 64, 64, m) for m in (Chop(0), Full(), Exact(offload=False)))
    for case, gib in ((fits, 1), (large, 3)):
        write_record(
            tmp_path / "published" / "prediction" / f"{case.name}.json",
            case.settings(), {"device_bytes": gib * 2**30}, MADE_BY,
        )  # fmt: skip
    assert tried(Config(published=True, limit_gib=2, out=tmp_path), [fits, large, unknown]) == [fits]
    assert f"fit into 2 GiB, so not tried: {large.name}, {unknown.name}\n" in capsys.readouterr().out
    assert tried(Config(out=tmp_path), [large, unknown]) == [large, unknown]


def test_nothing_is_timed_whose_peak_is_unknown(tmp_path, monkeypatch):
    case = Case("full:wan2.1", 9, 64, 64, Chop(0))
    monkeypatch.setattr(test_time, "SELECTION", Selection(published=True))
    monkeypatch.setattr(test_time, "RESULTS", tmp_path)
    write_record(tmp_path / "memory" / f"{case.name}.json", case.settings(), {"out_of_memory": False}, MADE_BY)
    laboratory = test_time.Laboratory()
    with pytest.raises(pytest.skip.Exception, match=f"not known to fit: {case.video.name}$"):
        test_time.test_time(case, laboratory, benchmark=None)


def test_a_loss_on_the_whole_video_is_the_same_loss():
    subject = Subject(Case("wan2.1", 9, 16, 16, Full()))
    (loss, gradient), (streamed, expected) = subject.run(Whole(Exact(pieces=True))), subject.run(Full())
    assert loss.item() == pytest.approx(streamed.item(), rel=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.fixture
def small(monkeypatch):
    """An embedded decoder in the place of the full-size ones, and a clean working tree."""
    monkeypatch.setattr(selection, "FULL_SIZE", {"wan2.1": "wan2.1"})
    monkeypatch.setattr(selection, "PUBLISHED", ((("wan2.1",), selection.Video((16, 16), (9,))),))
    monkeypatch.setattr(selection, "COMPARED", METHODS)
    monkeypatch.setattr("bench.__main__.provenance", lambda device: MADE_BY)


def test_the_command_from_prediction_to_page(small, tmp_path, capsys, monkeypatch):
    config = Config(published=True, device="cpu", out=tmp_path, phases=("predict", "memory"))
    main(config)
    records = {p.stem for p in (tmp_path / "published" / "memory").glob("*.json")}
    assert records == {f"wan2.1-9f-16x16-mse-float32-cpu-{name}" for name in ("full", "chop_0")}
    assert len(list((tmp_path / "published" / "prediction").glob("*.json"))) == len(METHODS)
    text = (tmp_path / "bench-published.md").read_text()
    assert "2 cases were both predicted and measured" in text and "within 5 %" in text
    assert all((tmp_path / f"bench-published{kind}.png").stat().st_size > 1000 for kind in ("", "-frontier"))
    monkeypatch.setattr("bench.memory.in_fresh_process", None)  # a second measurement or prediction would fail
    monkeypatch.setattr("bench.predict.in_fresh_process", None)
    capsys.readouterr()
    main(config)
    assert "failed" not in capsys.readouterr().out


def test_the_command_skips_what_is_too_large(small, tmp_path, capsys):
    main(Config(published=True, device="cpu", out=tmp_path, phases=("predict", "memory"), limit_gib=1e-3))
    assert "Not predicted to fit into 0.001 GiB, so not tried: wan2.1-9f" in capsys.readouterr().out
    (path, *_) = sorted((tmp_path / "published" / "prediction").glob("*.json"))
    assert read_record(path).metrics["device_bytes"] > 2**20
    assert not (tmp_path / "published" / "memory").exists()
