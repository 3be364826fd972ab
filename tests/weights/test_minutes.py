"""A training run that may take so many minutes ends in time, and what it leaves goes on as if it had not ended."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from weights import budget, train
from weights.budget import EXPORT, EXPORT_STEPS, PACE_STEPS, SAVING, Budget
from weights.settings import UNDECIDED, Config, clip_steps_to_fill


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(budget, "monotonic", lambda: clock.seconds)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.fixture
def unwritten(small, monkeypatch):
    """Of a finished model there is a folder; its last checkpoint tells the weights."""
    monkeypatch.setattr(train, "export", lambda vae, diet, config, out, *_: out.mkdir())
    return small


@pytest.fixture
def timed(unwritten, clock, monkeypatch):
    """Each step takes ten seconds."""
    batch = train.Diet.batch

    def ten_seconds(self, *args):
        clock.seconds += 10
        return batch(self, *args)

    monkeypatch.setattr(train.Diet, "batch", ten_seconds)
    return unwritten


def last(config):
    return torch.load(config.run / "checkpoint.pt", weights_only=True)


def assert_same_end(*configs):
    a, b = (last(config) for config in configs)
    assert a["step"] == b["step"]
    assert a["log"] == b["log"]
    assert all(torch.equal(x, y) for x, y in zip(a["model"].values(), b["model"].values(), strict=True))
    assert str(a["average"]) == str(b["average"])


def test_a_run_stops_in_time_and_goes_on_as_if_it_had_not(timed, clock, tmp_path, capsys):
    changes = {"optimizer": "muon", "ema_decay": 0.5}
    whole = timed("wan2.1", tmp_path / "whole", **changes)
    train.train(whole)
    began = clock.seconds
    config = timed("wan2.1", tmp_path / "parts", checkpoint_every_seconds=1e9, **changes)
    # Two steps, and a third that took twice as long, would leave no time for a checkpoint.
    config.minutes = 41 / 60
    assert train.train(config) is None
    assert clock.seconds - began == 20
    assert "Stopped wan2.1 after step 2 of 5; the same command goes on from" in capsys.readouterr().out
    assert not config.out.exists()
    config.minutes = None
    assert train.train(config) == config.out
    assert_same_end(config, whole)


def test_writing_the_model_is_left_to_the_next_call_where_no_time_is_left_for_it(timed, tmp_path, monkeypatch):
    config = timed("wan2.1", tmp_path, minutes=10)
    with monkeypatch.context() as patch:
        patch.setattr(budget, "EXPORT", 600)
        assert train.train(config) is None
    assert last(config)["step"] == 5
    assert train.train(config) == config.out


def test_a_signal_ends_the_run_after_its_step(timed, tmp_path, monkeypatch):
    whole = timed("wan2.1", tmp_path / "whole")
    train.train(whole)
    config = timed("wan2.1", tmp_path / "parts", checkpoint_every_seconds=1e9)
    batch, before = train.Diet.batch, signal.getsignal(signal.SIGTERM)

    def told(self, step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Diet, "batch", told)
        with pytest.raises(SystemExit, match="143"):
            train.train(config)
    assert signal.getsignal(signal.SIGTERM) is before
    assert last(config)["step"] == 3
    train.train(config)
    assert_same_end(config, whole)


def test_a_second_signal_is_as_usual(clock):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), Budget(None) as given:
            assert given.allows_step()
            os.kill(os.getpid(), signal.SIGINT)
            assert not given.allows_step()
            assert not given.allows_export()
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_time_is_kept_for_a_slow_step_a_checkpoint_and_the_model(clock):
    given = Budget(1)
    assert given.left() == 60 - SAVING
    given.took(saving=5)
    given.took(saving=1)
    assert given.left() == 55
    for _ in range(PACE_STEPS):
        assert given.pace == 0
        given.took(step=2)
    assert given.pace == 2
    clock.seconds += 50.9
    assert given.allows_step()
    clock.seconds += 0.2
    assert not given.allows_step()
    assert not given.allows_export()
    clock.seconds -= EXPORT + 2 * EXPORT_STEPS
    assert given.allows_export()
    assert Budget(None).left() == float("inf")


@pytest.mark.parametrize("clip_frames", [9, 17])
@pytest.mark.parametrize("decay_share", [0.2, 0.5, 0.8])
def test_clip_steps_fill_the_minutes(clock, clip_frames, decay_share):
    config = Config("wan2.1", image_steps=30, clip_steps=UNDECIDED, clip_frames=clip_frames, decay_share=decay_share)
    given = Budget(10)
    long = {9: 5 / 3, 17: 1}[clip_frames]  # a step of the last fifth, relative to the others
    for step in itertools.count():
        if config.clip_steps == UNDECIDED and (chosen := clip_steps_to_fill(config, step, given)):
            config.clip_steps = chosen
            assert step - 30 <= (1 - decay_share) * chosen + 1  # the rate was constant until here
        if step == config.steps:
            break
        assert given.allows_step()
        seconds = 0.1 if step < 30 else 0.5 if step < 30 + 0.8 * config.clip_steps else 0.5 * long
        clock.seconds += seconds
        given.took(step=seconds)
    assert given.allows_export()
    assert given.left(given.export) < 75


def test_a_run_that_fills_its_minutes_equals_one_of_as_many_steps(timed, clock, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.settings.PACE_STEPS", 2)
    monkeypatch.setattr(budget, "PACE_STEPS", 2)
    changes = {"image_steps": 1, "decay_share": 0.6, "snapshot_steps": (1,)}
    config = timed("wan2.1", tmp_path / "filled", minutes=0.5, fill_minutes=True, **changes)
    began = clock.seconds
    assert train.train(config) is None  # the pace is not known before these minutes are over
    assert 0 < clock.seconds - began < 30
    config.minutes = 6
    assert train.train(config) == config.out
    assert clock.seconds - began < 390
    steps = last(config)["settings"]["clip_steps"]
    assert 6 < steps < 40
    given = timed("wan2.1", tmp_path / "given", clip_steps=steps, **changes)
    train.train(given)
    assert_same_end(config, given)


@pytest.mark.parametrize("changes", [{"decay_share": 0.5}, {"minutes": 5.0}])
def test_what_cannot_fill_minutes_is_refused(small, tmp_path, changes):
    with pytest.raises(ValueError, match="fill_minutes needs minutes, and a decay_share below 1"):
        train.train(small("wan2.1", tmp_path, fill_minutes=True, **changes))
