"""The benchmark measures what it says, in a process of its own, and keeps what it has measured."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from bench import test_time
from bench.__main__ import Config, in_parallel, main, measure_time
from bench.baselines import BASELINES, FirstLatents, IsolatedLatents, SavedOnCpu, TinyDecoder
from bench.cases import ESTIMATES, Case, Inside, Whole, is_exact, label, measurable, plain
from bench.error import Reference, compare, measure_errors
from bench.estimates import seed_of_largest
from bench.memory import finished, in_fresh_process, is_out_of_memory, keep, peak, same_code
from bench.page.results import Results
from bench.page.tables import report
from bench.page.targets import targets
from bench.page.verdict import Verdict
from bench.predict import predict
from bench.selection import Selection, cases, has_error, is_predicted, is_timed, stages
from bench.subject import Subject
from chopgrad import Chop, Exact, Full, Sampled
from chopgrad.memory import PeakMemory
from suite.records import provenance, read_record, write_record
from tests import elsewhere
from tests.repository import committed, repository

CASE = Case("cogvideox", 9, 16, 16, Chop(1))
MADE_BY = provenance() | {"dirty": False}


@pytest.mark.parametrize("full", [False, True])
def test_cases_have_names_of_their_own(full):
    found = cases(Selection(full, "cuda" if full else "cpu"))
    names = [case.name for case in found]
    assert len(set(names)) == len(names) > 50
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-x") for name in names)


def test_the_full_sweep_is_complete_and_begins_with_what_is_most_useful():
    found = cases(Selection(full=True, device="cuda"))
    for vae in ("full:wan2.1", "full:wan2.2", "full:cogvideox"):
        for loss in ("mse", "lpips"):
            here = [c for c in found if c.vae == vae and c.loss == loss]
            assert {c.frames for c in here} >= {13, 33, 49, 81, 97, 193}
            assert len({(c.height, c.width) for c in here}) == 3
            assert {Chop(d, block=w) for d in (0, 1, 2, 4) for w in (1, 4, 8)} < {c.strategy for c in here}
            wanted = set(BASELINES) - {TinyDecoder()}  # whose weights are not here
            wanted -= {b for b in wanted if "Upstream" in label(b)} if "cogvideox" not in vae else set()
            assert {c.strategy for c in here if c.strategy in BASELINES} == wanted
            assert set(ESTIMATES) < {c.strategy for c in here}
    first = stages(Selection(full=True, device="cuda"))[:2]
    assert {(c.vae, c.frames, c.height, c.width) for c in first[0] + first[1]} == {
        ("full:wan2.1", 13, 480, 832),
        ("full:wan2.1", 81, 480, 832),
    }
    assert {Full(), Exact(offload=True, pieces=True), Chop(0), Chop(1)} < {c.strategy for c in first[0]}
    assert all(is_timed(c) and is_predicted(c) and not has_error(c) for c in found)


def test_gradients_are_checked_once_for_each_vae_and_not_in_every_stage(monkeypatch):
    told = []
    monkeypatch.setattr("bench.__main__.run", lambda command, **env: told.append(env["CHOPGRAD_BENCH_CHECKED"]))
    config, checked = Config(full=True, device="cuda", phases=("time",)), set()
    todo = stages(config.selection)
    for number in range(3):
        assert measure_time(config, number, todo[number], "x", float("inf"), checked) == []
    assert told == ["", "full:wan2.1", "full:wan2.1"]

    def fails(command, **env):
        raise RuntimeError("a gradient differs")

    monkeypatch.setattr("bench.__main__.run", fails)
    checked = set()
    assert measure_time(config, 0, todo[0], "x", float("inf"), checked) == ["time: a gradient differs"]
    assert not checked


def test_a_selection_is_passed_on_and_narrows_the_cases():
    selection = Selection(True, "cuda", vaes=("wan2.2",), sizes=("720x1280",), frames=(17,), losses=("mse",))
    assert Selection.from_json(selection.to_json()) == selection
    found = cases(selection)
    assert {(c.vae, c.frames, c.height, c.width) for c in found} == {("full:wan2.2", 17, 704, 1280)}
    only = cases(Selection(vaes=("cogvideox",), sizes=("40x40",)))
    assert {(c.vae, c.height) for c in only} == {("cogvideox", 40)}
    assert set(ESTIMATES) < {c.strategy for c in only}
    offloading = (SavedOnCpu(), Exact(True), Exact(True, pieces=True))
    assert all(measurable(c) != (plain(c.strategy) in offloading) for c in only)


@pytest.mark.parametrize("method", [Chop(0), Exact(offload=True, pieces=True), FirstLatents()], ids=label)
def test_cases_of_the_full_sweep_run(method):
    """The full-size architecture on a CPU, at a size that nobody would measure.

    In float32: some CPUs take many times as long for bfloat16.
    """
    (case,) = [
        c
        for c in cases(Selection(True, "cpu", vaes=("wan2.1",), sizes=("16x16",), frames=(5,), losses=("mse",)))
        if c.strategy == method
    ]
    metrics = peak(replace(case, dtype="float32"))
    assert metrics["weights_bytes"] > 2e8  # 73 million parameters
    assert metrics["gradient_norm"] > 0


def test_labels():
    assert label(Full()) == "Full()"
    assert label(Exact(offload=True, every=3, pieces=True)) == "Exact(every=3, offload, pieces)"
    assert label(Chop(2, block=4, recompute=True)) == "Chop(2, block=4, recompute)"
    assert label(Inside("frame", Chop(1))) == "Chop(1), checkpoint=frame"
    assert label(Whole(Exact(pieces=True))) == "Exact(pieces), decode"
    assert label(Sampled(3)) == "Sampled(3)"
    assert label(Sampled(3, Exact(pieces=True))) == "Sampled(3, Exact(pieces))"


def test_peak_memory_in_a_fresh_process_is_kept(tmp_path, monkeypatch):
    metrics = keep(peak, CASE, tmp_path, MADE_BY)
    subject = Subject(CASE)
    assert metrics["weights_bytes"] == sum(p.nbytes for p in subject.decoder.parameters())
    assert 1e6 < metrics["peak_bytes"] < 1e9
    assert metrics["loss"] == pytest.approx(subject.run()[0].item(), rel=1e-5)
    monkeypatch.setattr("bench.memory.in_fresh_process", None)  # a second measurement would fail
    assert keep(peak, CASE, tmp_path, MADE_BY) == metrics
    with pytest.raises(TypeError):
        keep(peak, CASE, tmp_path, MADE_BY | {"commit": "another"})


@pytest.mark.parametrize(
    "method", [Chop(1), Exact(offload=False), Whole(Chop(1)), IsolatedLatents(), FirstLatents(1)], ids=label
)
def test_predictions_are_what_a_run_takes(method):
    case = Case("wan2.1", 25, 16, 16, method)
    assert predict(case)["peak_bytes"] == pytest.approx(peak(case)["peak_bytes"], rel=0.02)


def test_only_inside_recomputes_within_a_group():
    subject = Subject(Case("wan2.1", 9, 32, 32, Chop(1)))
    peaks = {}
    for method in (Chop(1), Inside("residual", Chop(1))):
        with PeakMemory() as memory:
            subject.run(method)
        peaks[label(method)] = memory.peak_bytes
    plain, inside = peaks.values()
    assert inside < 0.95 * plain


def test_a_decoder_that_is_meant_to_train_is_not_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Subject(replace(CASE, trainable_decoder=True)).run()


def test_what_waits_on_the_host_is_predicted_as_such():
    full, saved = (predict(Case("wan2.1", 9, 16, 16, m)) for m in (Full(), SavedOnCpu()))
    assert saved["peak_bytes"] < 0.75 * full["peak_bytes"]  # a graph keeps less than it did, the rest is what runs
    assert saved["host_bytes"] > 0.5 * full["peak_bytes"]


def test_gradient_errors_on_a_real_clip(tmp_path):
    chosen = [
        Case("cogvideox", 33, 16, 16, m)
        for m in (Exact(offload=False), Chop(0), Chop(1), IsolatedLatents(), FirstLatents())
    ]
    measure_errors(chosen, tmp_path, MADE_BY, crops=1)
    exact, zero, one, isolated, first = (read_record(tmp_path / f"{c.name}.json").metrics for c in chosen)
    assert exact["relative_error"][0] < 1e-4
    assert 0.01 < one["relative_error"][0] < zero["relative_error"][0] < 1
    assert one["frames_compared"] == 33 and one["frames_rms_difference"][0] == 0
    assert isolated["frames_compared"] == 9 and isolated["frames_rms_difference"][0] > 1e-3
    # The frames of the first latents are right, and so is the gradient of their loss; but it is not the whole gradient.
    assert first["frames_compared"] == 9 and first["frames_rms_difference"][0] < 1e-5
    assert first["relative_error_same_frames"][0] < 1e-4 < 0.1 < first["relative_error"][0]
    assert (
        is_exact(Exact(offload=False))
        and not is_exact(Chop(1))
        and not is_exact(FirstLatents())
        and is_exact(SavedOnCpu())
    )


@pytest.mark.parametrize("inner", [Chop(0), Exact(offload=False)], ids=label)
def test_errors_of_an_estimate_are_those_over_all_draws(inner, monkeypatch):
    """Against the gradients of every draw of two of three losses, and a record of the right shape."""
    subject = Subject(Case("cogvideox", 25, 16, 16, Full()))
    assert len(subject.decoder.frame_groups(subject.latents.shape[2])) == 3
    reference = Reference(subject)
    found = compare(subject, Sampled(2, inner), reference)
    draws = []
    for draw in itertools.permutations(range(3)):
        monkeypatch.setattr(torch, "randperm", lambda n, draw=draw, **_: torch.tensor(draw))
        draws.append(subject.run(Sampled(2, inner))[1])
    b, g = torch.stack(draws).double(), reference.gradient.double()
    mean, square = b.mean(0), g.square().sum()
    assert found["relative_error"] ** 2 == pytest.approx(((b - g).square().sum() / 6 / square).item(), rel=1e-3)
    assert found["relative_error_of_mean"] == pytest.approx(((mean - g).norm() / g.norm()).item(), rel=1e-3, abs=1e-5)
    assert found["relative_variance"] == pytest.approx(((b - mean).square().sum() / 6 / square).item(), rel=1e-3)
    scale = (b * g).sum() / b.square().sum()
    best = ((scale * b - g).square().sum() / 6 / square).sqrt().item()
    assert found["best_scaled_error"] == pytest.approx(best, rel=1e-3)


def test_memory_of_an_estimate_is_that_of_its_largest_draw():
    case = Case("cogvideox", 25, 16, 16, Sampled(2, Full()))
    torch.manual_seed(seed_of_largest(case.strategy, 3))
    assert [w > 0 for w in case.strategy.weights([1.0] * 3)] == [False, True, True]
    largest = peak(case)["peak_bytes"]
    assert largest == pytest.approx(predict(case)["peak_bytes"], rel=0.02)
    subject = Subject(case)
    torch.manual_seed(next(s for s in range(99) if draws_first(case.strategy, s)))
    with PeakMemory() as memory:
        subject.run()
    assert memory.peak_bytes < largest


def draws_first(strategy, seed):
    torch.manual_seed(seed)
    return strategy.weights([1.0] * 3)[2] == 0


def test_the_check_before_timing_covers_estimates(monkeypatch):
    case = Case("wan2.1", 17, 32, 32, Full())
    monkeypatch.setattr(test_time, "STRATEGIES", (Chop(1),))
    test_time.check_gradients(case)
    biased = lambda self, weights: [w * (i % 2) for i, w in enumerate(weights)]  # noqa: E731
    monkeypatch.setattr(Sampled, "weights", lambda self, weights: biased(self, weights) if weights[0] != 1 else weights)
    with pytest.raises(AssertionError, match=r"wan2.1, Sampled\(1\): gradient differs"):
        test_time.check_gradients(case)


def fails(case):
    raise KeyError("reason")


def runs_out(case):
    import torch

    raise torch.OutOfMemoryError("of memory")


def dies(case):
    import os

    os._exit(3)


def forked(case):
    return {"may_not_use_cuda": torch.cuda._is_in_bad_fork()}


def test_a_process_that_measures_on_cuda_may_use_it():
    """Importing diffusers asks for devices; a fork of a process that did so is refused by CUDA."""
    assert in_fresh_process(forked, replace(CASE, device="cuda")) == {"may_not_use_cuda": False}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("of memory"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # pinned host memory
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(("free", "expected"), [(2, True), (40, False)])
def test_a_missing_engine_is_want_of_memory_on_a_full_card_only(free, expected, monkeypatch):
    """cuDNN says the same where it has no workspace, and where it has no such operator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: 1.0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 69 * 2**30)
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert is_out_of_memory(error) == expected


def test_one_case_that_fails_does_not_cost_the_others(capsys):
    done = []

    def work(item):
        if item == 1:
            raise RuntimeError("item 1: the reason")
        done.append(item)

    assert in_parallel(work, [0, 1, 2], 1, float("inf"), "memory") == ["memory: item 1: the reason"]
    assert done == [0, 2]


def test_a_commit_that_leaves_the_code_alone_undoes_nothing_that_took_hours(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("bench.memory.same_code", lambda old, new: asked.append((old, new)) or new == "c" * 40)
    path = tmp_path / "record.json"
    for case, commit, expected in (
        (CASE, "b" * 40, None), (CASE, "c" * 40, None),
        (replace(CASE, device="cuda"), "b" * 40, None), (replace(CASE, device="cuda"), "c" * 40, {"x": 1}),
        (replace(CASE, vae="full:wan2.1"), "c" * 40, {"x": 1}),
    ):  # fmt: skip
        write_record(path, case.settings(), {"x": 1}, MADE_BY | {"commit": "a" * 40})
        assert finished(path, case, MADE_BY | {"commit": commit}) == expected
    assert asked == [("a" * 40, "b" * 40), ("a" * 40, "c" * 40), ("a" * 40, "c" * 40)]


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("bench/a.py", "x = 1  # a reason\n", True),
        ("report/a.py", "x = 2\n", True),
        ("bench/a.py", "x = 2\n", False),
        ("constraints.txt", "torch==2\n", False),
    ],
)
def test_same_code(tmp_path, monkeypatch, name, text, same):
    git = repository(tmp_path, {"bench/a.py": "x = 1\n", "report/a.py": "x = 1\n", "constraints.txt": "torch==1\n"})
    monkeypatch.setattr("bench.memory.ROOT", tmp_path)
    same_code.cache_clear()
    old = git("rev-parse", "HEAD")
    (tmp_path / name).write_text(text)
    new = committed(git)
    assert same_code(old, old)
    assert same_code(old, new) == same_code(new, old) == same
    assert not same_code(old, "0" * 40)
    assert not same_code(None, new) and not same_code(new, None)


def test_gradient_errors_mix_no_devices():
    """On the stand-in for a GPU: losses on a baseline's own pixels, and estimates."""
    with elsewhere.strict():
        subject = Subject(Case("wan2.1", 9, 16, 16, Full(), device=elsewhere.DEVICE))
        reference = Reference(subject)
        for method in (FirstLatents(), Sampled(1)):
            assert compare(subject, method, reference)["relative_error"] is not None


def test_what_goes_wrong_in_the_process_is_told():
    assert in_fresh_process(runs_out, CASE) == {"out_of_memory": True}
    with pytest.raises(RuntimeError, match=r"cogvideox-9f.*KeyError: 'reason'"):
        in_fresh_process(fails, CASE)
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        in_fresh_process(dies, CASE)


@pytest.mark.parametrize(("frames", "height"), [(8 + 3, 16), (9, 20)])
def test_a_video_that_the_decoder_does_not_give(frames, height):
    with pytest.raises(ValueError, match="cogvideox does not decode to"):
        Subject(Case("cogvideox", frames, height, 16, Full()))


def write(folder, kind, case, metrics):
    write_record(folder / kind / f"{case.name}.json", case.settings(), metrics, MADE_BY)


def memory(mib):
    return {"out_of_memory": False, "peak_bytes": round(mib * 2**20), "weights_bytes": 2**20, "latents_bytes": 0}


def prediction(mib):
    return {"peak_bytes": round(mib * 2**20), "device_bytes": 0, "host_bytes": 0, "resident_bytes": 0}


def time(mean, reference="Full()"):
    ratio = [mean, mean - 0.1, mean + 0.1]
    return {"out_of_memory": False, "ratio_to_reference": ratio, "reference": reference, "seconds_median": 1.0}


def test_the_report_shows_what_is_there_and_what_is_missing(tmp_path):
    methods = (Full(), Chop(1), Exact(offload=True), FirstLatents(), Sampled(2))
    chosen = [Case("wan2.1", n, 32, 32, m) for n in (9, 17) for m in methods]
    _, chop, offload, _, estimate, _, longer, _, _, _ = chosen
    write(tmp_path, "memory", chop, memory(3))
    write(tmp_path, "prediction", chop, prediction(3.3))
    write(tmp_path, "time", chop, time(1.5))
    write(tmp_path, "gradient_error", chop, {"relative_error": [0.4, 0.3, 0.5]})
    spread = {"relative_error_of_mean": [0.4, 0.3, 0.5], "relative_variance": [0.84, 0.8, 0.9]}
    write(tmp_path, "gradient_error", estimate, {"relative_error": [1.0, 0.9, 1.1], **spread})
    write(tmp_path, "prediction", offload, prediction(2))
    write(tmp_path, "memory", longer, {"out_of_memory": True})
    text = report(tmp_path, chosen, "bench-cpu")
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["Chop(1)"] == ["3.0 MiB", "out of memory", "1.50 [1.40, 1.60]", "0.400 [0.300, 0.500]", "1.100"]
    assert rows["Exact(offload)"][0] == "*p* 2.0 MiB"
    assert rows["Full()"][0] == "not measured"
    assert rows["Sampled(2) (estimate)"][3] == "1.000 [0.900, 1.100]"
    assert "Sampled(2) is an estimate, unbiased for Chop(1)" in text
    assert "|E b - g| / |g|, is 0.400 and its relative variance, E|b - E b|^2 / |g|^2, 0.840" in text
    assert "NOT within 5 % in 1 cases" in text
    assert "diffusers has no gradient checkpointing for Wan" in text
    assert report(tmp_path / "nowhere", chosen, "bench-cpu") == "No case was measured.\n"
    write(tmp_path, "prediction", chop, prediction(3.1))
    assert "within 5 %" in report(tmp_path, chosen, "bench-cpu") and "NOT within" not in report(
        tmp_path, chosen, "bench-cpu"
    )


def test_an_error_through_random_weights_is_not_shown(tmp_path):
    case = Case("full:wan2.1", 17, 480, 832, Chop(1), dtype="bfloat16", device="cuda")
    write(tmp_path, "memory", case, memory(3))
    text = report(tmp_path, [case], "bench-full-cuda")
    assert "n/a" in text and "random weights have no temporal locality" in text


def verdicts(folder, chosen, predicted=None):
    return {v.target: v for v in targets(Results(folder, chosen), predicted or folder / "nothing")}


@pytest.mark.parametrize(("long", "verdict"), [(10.1, "reached"), (10.3, "NOT reached")])
def test_constant_memory_is_judged(tmp_path, long, verdict):
    chosen = [
        Case("wan2.1", n, 16, 16, m)
        for n in (25, 193)
        for m in (Chop(1), Chop(4), Exact(offload=True), Exact(offload=False))
    ]
    for case in chosen:
        is_long = case.frames == 193
        if case.strategy == Exact(offload=True):
            write(tmp_path, "prediction", case, prediction(5))
        else:
            write(tmp_path, "memory", case, memory(long if is_long else 10))
    found = [v for v in targets(Results(tmp_path, chosen), tmp_path / "nothing") if "193 / 25" in v.target]
    (first,) = [v for v in found if v.kind == "measured"]
    assert first.verdict == verdict and "2 strategies" in first.numbers  # Exact(offload=False) promises nothing
    (second,) = [v for v in found if v.kind == "predicted"]
    assert second.verdict == "reached" and "1.000 (Exact(offload))" in second.numbers


def test_times_are_judged_and_a_cpu_decides_nothing_about_offloading(tmp_path):
    methods = (Full(), Exact(offload=False), Exact(pieces=True), Exact(offload=True), Chop(1), Chop(1, block=8))
    chosen = [Case("wan2.1", 33, 40, 40, m) for m in methods]
    for case, mean in zip(chosen, (1.0, 1.3, 1.9, None, 1.4, 1.05), strict=True):
        if mean:
            write(tmp_path, "time", case, time(mean))
    found = verdicts(tmp_path, chosen)
    by_start = {t.split(":")[0]: v for t, v in found.items()}
    assert by_start["Exact(offload) <= 1.40 of the time of Full()"].verdict == "not measured here"
    assert (
        "without transfers, Exact(offload=False): 1.30"
        in by_start["Exact(offload) <= 1.40 of the time of Full()"].numbers
    )
    look_ahead = by_start["Chop(1, block=8) takes less time than the paper's Chop(1)"]
    assert look_ahead[1:] == ("reached", "1.05 [0.95, 1.15] against 1.40 [1.30, 1.50]", "measured")
    pieces = next(v for t, v in found.items() if t.startswith("Exact(offload, pieces) <= 1.75"))
    assert pieces.verdict == "NOT reached" and pieces.kind == "stand-in"  # transfers only add to it
    on_gpu = [Case("full:wan2.1", 17, 256, 448, m, dtype="bfloat16", device="cuda") for m in methods]
    for offloading, against_full, against_paper in (
        (1.25, "reached", "undecided"),
        (1.35, "undecided", "undecided"),
        (1.65, "NOT reached", "NOT reached"),
    ):
        for case, mean in zip(on_gpu, (1.0, 1.3, 1.9, offloading, 1.4, 1.05), strict=True):
            write(tmp_path, "time", case, time(mean))
        found = {t.split(":")[0]: v for t, v in verdicts(tmp_path, on_gpu).items()}
        assert found["Exact(offload) <= 1.40 of the time of Full()"].verdict == against_full
        assert found["Exact(offload) takes less time than the paper's Chop(1)"].verdict == against_paper


def test_a_measurement_decides_about_four_gib_where_there_is_one(tmp_path):
    methods = (Full(), Chop(1), Exact(offload=True, pieces=True))
    chosen = [Case("full:wan2.1", 97, 720, 1280, m, dtype="bfloat16", device="cuda") for m in methods]
    name = "exact gradient in at most 4 GiB: full-size wan2.1, 97 frames of 720x1280"
    assert verdicts(tmp_path, chosen)[name][1] == "not measured here"
    settings = {"vae": "wan2.1", "frames": 97, "height": 720, "width": 1280}
    rows = [
        {
            "strategy": label(m),
            "device_bytes": g * 2**30,
            "relative_compute": c,
            "distance": 1 if m == Chop(1) else None,
        }
        for m, g, c in zip(methods, (985, 100, 3), (1.0, 1.67, 1.67), strict=True)
    ]
    write_record(tmp_path / "predicted" / "a.json", settings, {"predictions": rows}, MADE_BY)
    found = verdicts(tmp_path, chosen, tmp_path / "predicted")[name]
    assert found == Verdict(
        name, "reached", "Exact(offload, pieces) 3.0 GiB; Full() 985.0 GiB (predicted), Chop(1) 100.0 GiB (predicted)",
        "predicted",
    )  # fmt: skip
    write(tmp_path, "memory", chosen[2], memory(5 * 1024))
    assert verdicts(tmp_path, chosen, tmp_path / "predicted")[name].verdict == "NOT reached"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"full": True, "device": "cpu"}, "--full measures the full-size decoders.*run it on a machine with a GPU"),
        (
            {"published": True, "device": "cuda"},
            "--published measures the full-size decoders on the CPU: pass --device c",
        ),
        ({"published": True, "full": True, "device": "cpu"}, "--published .*leave out --full, or pass --full alone"),
        ({"published": True, "device": "cpu", "limit_gib": 0}, "--limit-gib must be positive, got 0"),
        ({"published": True, "device": "cpu", "sizes": ("8x8",)}, "No case is left of vaes all, sizes"),
        ({"rounds": 0, "device": "cpu"}, "--rounds must be at least 1, got 0"),
        ({"minutes": 0, "device": "cpu"}, "--minutes must be positive, got 0"),
        ({"sizes": ("480",), "device": "cpu"}, "--sizes takes HEIGHTxWIDTH in pixels, such as 480x832; got '480'"),
        ({"frames": (16,), "device": "cpu"}, r"--frames must be 1 \+ a multiple of 4, got 16"),
        ({"losses": ("ssim",), "device": "cpu"}, "--losses: 'ssim' is unknown; pass some of mse"),
        ({"vaes": ("wan2.2",), "device": "cpu"}, "--vaes: 'wan2.2' is not measured here; pass some of wan2.1, cogvid"),
        ({"sizes": ("8x8",), "device": "cpu"}, "No case is left of vaes all, sizes"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(Config(**settings))
