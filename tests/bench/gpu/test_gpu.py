"""What runs on a card for some minutes, rehearsed on a CPU: the same code on a few pixels."""

import json
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.baselines import SavedOnCpu
from bench.cases import Inside, label
from bench.gpu import compare, measure
from bench.gpu.__main__ import Config, check, counts_of, main, run_tests
from bench.gpu.clock import Clock, OutOfTime, at_most
from bench.gpu.measure import Video, watched
from bench.gpu.rows import LEAST, OFFLOAD, Row, methods_by_label, rows, streamed, tiny
from bench.gpu.session import Session
from chopgrad import Chop, Exact, Full, offload
from suite.records import read_record, read_records


def short(*methods, **settings):
    return Row("short", "wan2.1", 9, 16, 16, streamed(*methods), **settings)


def session(tmp_path, seconds=600.0):
    return Session(tmp_path, seconds, "cpu")


def test_a_rehearsal_goes_through_everything_but_the_card(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.gpu.__main__.tiny", lambda found: [replace(r, rounds=1) for r in tiny(found)])
    main(Config(out=tmp_path, dry_run=True, tests=False, only=("card", "calls", "repeated", "saved-on-cpu")))
    records = {r.path.stem: r for r in read_records(tmp_path / "cpu")}
    assert sorted({r.settings["row"] for r in records.values()}) == ["calls", "card", "repeated", "saved-on-cpu"]
    patched = records["calls-patch-exact_every_1_offload_pieces_checkpoint_frame"].metrics
    assert patched["reference"] == "Full()"
    assert patched["difference_from_reference"] < 1e-5
    assert len(patched["seconds"]) == len(patched["reference_seconds"]) == 1
    assert patched["time_ratio"] == pytest.approx(patched["seconds"][0] / patched["reference_seconds"][0])
    again = records["repeated-frame-loss-exact_every_1_offload_pieces_checkpoint_frame"].metrics
    assert len(again["reserved_after_call_bytes"]) == 2
    assert records["card"].metrics["pinning_gib_per_s"] > 0
    assert all(r.provenance["torch"] == torch.__version__ for r in records.values())
    with zipfile.ZipFile(tmp_path / "cpu.zip") as archive:
        assert {name for name in archive.namelist() if name.endswith(".json")} == {
            f"cpu/{name}.json" for name in records
        }
        assert "cpu/log.txt" in archive.namelist()
    assert "Send cpu.zip" in capsys.readouterr().out


def test_float32_is_the_measure_of_an_exact_gradient(tmp_path):
    s = session(tmp_path)
    compare.the_row(s, short(Full(), LEAST, Chop(0), rounds=0, error=True))
    errors = {r.settings["strategy"]: r.metrics["error_to_float32"] for r in read_records(s.folder)}
    assert errors[label(Full())] < 1e-5
    assert errors[label(LEAST)] < 1e-5
    assert errors["Chop(0)"] > 0.1


def test_the_first_method_stays_what_the_others_are_compared_with(tmp_path):
    s = session(tmp_path)
    compare.the_row(s, short(Full(), Chop(0), Exact(offload=False), Chop(2), rounds=1))
    found = {r.settings["strategy"]: r.metrics for r in read_records(s.folder)}
    assert {name: m["reference"] for name, m in found.items()} == {
        "Full()": None, "Chop(0)": "Full()", "Exact(offload=False)": "Full()", "Chop(2)": "Full()",
    }  # fmt: skip
    assert found["Exact(offload=False)"]["difference_from_reference"] < 1e-5  # and not from Chop(0)


def test_weights_come_back_from_float32_as_they_were(tmp_path):
    video = Video(short(Full()), "bfloat16", "cpu")
    before = [p.clone() for p in video.subject.decoder.parameters()]
    exact = compare.in_float32(session(tmp_path), video)
    assert exact.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, video.subject.decoder.parameters(), strict=True))
    assert video.subject.latents.dtype == video.subject.target.dtype == torch.bfloat16


def test_running_out_of_memory_is_a_result_and_another_error_is_told(tmp_path, monkeypatch):
    run = Video.run

    def fails(self, call, method):
        if isinstance(method, Full):
            raise_with = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        elif isinstance(method, Exact):
            raise_with = RuntimeError("unsupported\nand more")
        else:
            return run(self, call, method)

        def failing():
            raise raise_with

        return failing

    monkeypatch.setattr(Video, "run", fails)
    s = session(tmp_path)
    compare.the_row(s, short(Full(), Exact(offload=False), Chop(0), Chop(1), rounds=0))
    found = {r.settings["strategy"]: r.metrics for r in read_records(s.folder)}
    assert found["Full()"]["out_of_memory"]
    assert sorted(found) == ["Chop(0)", "Chop(1)", "Full()"]
    assert found["Chop(1)"]["reference"] == "Chop(0)"  # the first that ran
    log = (s.folder / "log.txt").read_text()
    assert "Full(): out of memory" in log
    assert "Exact(offload=False): failed: RuntimeError: unsupported\n" in log


def test_a_card_too_small_for_float32_still_measures_the_row(tmp_path, monkeypatch):
    run = measure.Subject.run

    def fails_in_float32(self, method=None):
        if self.latents.dtype is torch.float32 and method == LEAST and not done:
            done.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, method)

    done = []
    monkeypatch.setattr(measure.Subject, "run", fails_in_float32)
    s = session(tmp_path)
    compare.the_row(s, short(Chop(0), LEAST, rounds=0, error=True))
    found = {r.settings["strategy"]: r.metrics for r in read_records(s.folder)}
    assert done and sorted(found) == sorted(["Chop(0)", label(LEAST)])
    assert not any("error_to_float32" in metrics for metrics in found.values())
    assert "the gradient in float32: out of memory" in (s.folder / "log.txt").read_text()


def test_the_reference_may_fail_later_and_costs_no_other_its_first_call(tmp_path, monkeypatch):
    run, calls = Video.run, []

    def fails_twice(self, call, method):
        work = run(self, call, method)

        def counted():
            calls.append(method)
            if isinstance(method, Full) and calls.count(method) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work()

        return counted

    monkeypatch.setattr(Video, "run", fails_twice)
    s = session(tmp_path)
    compare.the_row(s, short(Full(), Chop(0), rounds=1))
    found = {r.settings["strategy"]: r.metrics for r in read_records(s.folder)}
    for metrics in found.values():
        assert metrics["out_of_memory"] is False and metrics["first_s"] > 0
        assert metrics["stopped"] == "OutOfMemoryError in the timed rounds"
        assert metrics["seconds"] == [] and metrics["time_ratio"] is None
    assert found["Chop(0)"]["difference_from_reference"] > 0.1


def test_a_host_that_is_too_small_is_told_before_the_kernel_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "available_bytes", lambda device: 2**30)
    monkeypatch.setattr(compare, "measure", lambda *how: pytest.fail("it was begun"))
    s = session(tmp_path)
    video, row = Video(short(OFFLOAD), "float32", "cpu"), replace(short(OFFLOAD), height=720, width=1280)
    s.device, video.row = "cuda", row
    assert compare.a_method(s, video, "frame_loss", OFFLOAD, "name", None, 1.0, None) is None
    assert "would pin 11 GiB, 1 GiB of host memory are free" in (s.folder / "log.txt").read_text()
    assert compare.chooses_every(Exact(offload=True)) and not compare.chooses_every(OFFLOAD)


def test_what_would_not_end_in_time_is_not_begun(tmp_path):
    s = session(tmp_path, seconds=5)
    s.clock.learn("wan2.1", 1.0, Full(), 1e6)
    compare.the_row(s, short(Full()))
    assert not list(read_records(s.folder))
    assert "would take" in (s.folder / "log.txt").read_text()


def test_what_does_not_end_in_time_is_stopped(tmp_path, monkeypatch):
    def endless(self, call, method):
        def run():
            while True:
                time.sleep(0.001)

        return run

    monkeypatch.setattr(Video, "run", endless)
    monkeypatch.setattr(Clock, "estimate", lambda *args: 0.0)
    monkeypatch.setattr(Clock, "left", property(lambda self: 1.0))
    s = session(tmp_path)
    compare.the_row(s, short(Chop(0)))
    assert not list(read_records(s.folder))
    assert "stopped, its time was over" in (s.folder / "log.txt").read_text()


def test_an_earlier_run_of_the_same_commit_is_not_measured_again(tmp_path, monkeypatch):
    s = session(tmp_path)
    s.made_by |= {"commit": "a" * 40, "dirty": False}
    compare.the_row(s, short(Chop(0), Chop(1), rounds=0))
    paths = sorted(s.folder.glob("short-*.json"))
    assert len(paths) == 2
    begun = []
    monkeypatch.setattr(
        Video, "run", lambda self, call, method, run=Video.run: begun.append(method) or run(self, call, method)
    )
    compare.the_row(s, short(Chop(0), Chop(1), Chop(2), rounds=0))
    assert begun == [Chop(0), Chop(2)]  # the reference, to compare with, and what was missing
    monkeypatch.setattr(compare, "Video", None)  # nothing is built
    compare.the_row(s, short(Chop(0), Chop(1), Chop(2), rounds=0))
    for changed in ({"commit": None}, {"commit": "b" * 40}, {"dirty": True}, {"torch": "0"}, {"device": "another"}):
        other = session(tmp_path)
        other.made_by |= {"commit": "a" * 40, "dirty": False} | changed
        assert not other.has(paths[0].stem)
    assert read_record(paths[0]).provenance["commit"] == "a" * 40


def test_a_clock_learns_what_each_method_takes():
    clock = Clock(100, pinning=2.0)
    clock.learn_forward("v", 2.0, 0.1)
    full = 3 * 0.1 / 2.0
    assert clock.estimate("v", 4.0, 3, Full()) == pytest.approx(2 + 3 * 4 * Clock.TIMES_FULL * full)
    over_the_bus = clock.estimate("v", 4.0, 3, Chop(1, offload=True)) - clock.host_gib(4.0, Chop(1, offload=True)) / 2
    assert over_the_bus == pytest.approx(2 + 3 * 4 * Clock.TIMES_FULL_ON_HOST * full)
    clock.learn("v", 2.0, Full(), 0.2)
    clock.learn("v", 2.0, Full(), 0.1)
    assert clock.estimate("v", 4.0, 3, Full()) == pytest.approx(2 + 3 * 4 * 0.1)
    # One slow method says nothing of the others.
    clock.learn("v", 2.0, Chop(1, offload=True), 100.0)
    assert clock.estimate("v", 4.0, 3, Chop(1)) < 20
    pinned = clock.estimate("v", 4.0, 3, Exact(offload=True)) - clock.estimate("v", 4.0, 3, Exact(offload=False))
    assert pinned == pytest.approx(Clock.HOST_GIB * 4 / 2)
    assert 99 < clock.left <= 100


def test_a_limit_of_time_is_lifted_afterwards():
    with pytest.raises(OutOfTime), at_most(0.01):
        while True:
            time.sleep(0.001)
    with at_most(0.02):
        pass
    time.sleep(0.05)  # would be interrupted now


def test_a_limit_that_a_finalizer_swallowed_comes_again(monkeypatch):
    class Swallows:
        def __del__(self):
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                pass

    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: None)
    with pytest.raises(OutOfTime), at_most(0.05):
        x = Swallows()
        del x  # the limit falls into this, where no exception gets out
        time.sleep(5)


def test_peaks_are_read_from_the_allocator_and_pinned_bytes_are_counted(monkeypatch):
    stats = iter(
        [
            {"allocated_bytes.all.current": 100, "requested_bytes.all.current": 90, "num_alloc_retries": 1},
            {
                "allocated_bytes.all.peak": 300, "requested_bytes.all.peak": 250, "reserved_bytes.all.peak": 400,
                "num_alloc_retries": 3,
            },
        ]
    )  # fmt: skip
    pinning = iter([1_000_000, 3_500_000])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: next(stats))
    monkeypatch.setattr(measure, "host_stats", lambda: {"host_alloc_time.total": next(pinning)})
    before = offload.pinned_bytes()
    with watched("cuda") as found:
        offload._count_pinned(64)
        offload._count_pinned(32)
        offload._count_pinned(-96)
    assert offload.pinned_bytes() == before
    assert found == {
        "allocated_peak_bytes": 200, "requested_peak_bytes": 160, "resident_bytes": 100, "reserved_peak_bytes": 400,
        "retries": 2, "pinned_peak_bytes": before + 96, "pinning_s": 2.5,
    }  # fmt: skip


def test_the_chosen_every_is_in_the_record(tmp_path):
    s = session(tmp_path)
    compare.the_row(s, short(Exact(offload=False), Exact(every=2), rounds=0))
    found = {r.settings["strategy"]: r.metrics.get("every") for r in read_records(s.folder)}
    assert found == {"Exact(offload=False)": 1, "Exact(every=2)": None}  # where nothing is chosen, nothing is told


def test_a_gradient_that_is_not_finite_is_no_result():
    with pytest.raises(FloatingPointError, match="not finite"):
        measure.measure(lambda: torch.tensor([1.0, float("nan")]), None, 0, "cpu")


def test_a_pytorch_that_tells_nothing_of_pinned_memory_is_measured_too(monkeypatch):
    monkeypatch.delattr(torch.cuda, "host_memory_stats", raising=False)
    assert measure.host_stats() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compare.host_is_full() is False


def test_rows_of_small_and_large_cards():
    for gib in (24, 80, 139):
        found = rows(gib)
        assert [row.name for row in found][:2] == ["wan-short", "cogvideox-short"]
        assert len({row.name for row in found}) == len(found)
    assert "wan-medium" in [row.name for row in rows(139)]
    known = methods_by_label()
    assert all(label(method) in known for row in rows(139) for _, method in row.methods)
    assert isinstance(known["Exact(every=1, offload, pieces), checkpoint=frame"], Inside)
    assert SavedOnCpu() in known.values()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"only": ("wan",), "dry_run": True}, "no row 'wan'; pass some of card, wan-short"),
        ({"minutes": 0.0, "dry_run": True}, "--minutes must be positive"),
        ({"training": "--data x", "dry_run": True}, "--training goes with --train"),
        ({"measure": False, "dry_run": True}, "leaves nothing to do"),
        ({}, "sees no CUDA device"),
    ],
)
def test_bad_settings_are_told_before_any_work(settings, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        check(Config(**settings))


def test_outcomes_are_counted_of_a_run_that_was_stopped_too():
    lines = "5 workers [4 items]\n[gw0] [ 25%] PASSED tests/a.py::b\n[gw1] [ 50%] FAILED tests/a.py::c\n"
    assert counts_of(lines) == {"passed": 1, "failed": 1, "unfinished": 2}
    assert counts_of("collected 2 items\n\ntests/a.py::b PASSED [ 50%]\n") == {"passed": 1, "unfinished": 1}
    assert counts_of(lines + "== 1 failed, 3 passed in 2.00s ==") == {"failed": 1, "passed": 3}
    assert counts_of("no tests ran") == {}


def test_tests_that_do_not_end_are_stopped_with_their_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu.__main__.TEST_SECONDS", 0.5)
    s = session(tmp_path)
    run_tests(s)
    assert "tests: no result, exit code None (stopped)" in (s.folder / "log.txt").read_text()
    assert not s.has("tests")


def test_a_card_without_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 does not compute in bfloat16"):
        check(Config())


def test_the_archive_is_written_whatever_happens(tmp_path, monkeypatch):
    def fails(*how):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("bench.gpu.__main__.measure_all", fails)
    with pytest.raises(RuntimeError):
        main(Config(out=tmp_path, dry_run=True))
    assert (tmp_path / "cpu.zip").exists()


def test_training_takes_the_minutes_that_are_left(tmp_path, monkeypatch):
    started = []
    run = lambda command, **how: started.append(command) or SimpleNamespace(returncode=0)  # noqa: E731
    monkeypatch.setattr("bench.gpu.__main__.subprocess", SimpleNamespace(run=run))
    words = "--data d.zip --workers 2"
    main(Config(out=tmp_path, minutes=2, dry_run=True, measure=False, train="wan2.1", training=words))
    ((_, script, *options),) = started
    assert script.endswith("train.py")
    assert options[:4] == ["--model", "wan2.1", "--device", "cpu"]
    assert 1.4 < float(options[options.index("--minutes") + 1]) < 1.6  # without the start and what is kept at the end
    assert options[-4:] == words.split()


def test_records_name_no_path_of_the_machine(tmp_path):
    s = session(tmp_path)
    compare.the_row(s, short(Chop(0), rounds=0))
    (path,) = s.folder.glob("*.json")
    assert str(tmp_path) not in json.dumps(json.loads(path.read_text()))
