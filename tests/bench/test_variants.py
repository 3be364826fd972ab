"""What pays inside the engine: ratios to the plain decoder, and a page that shows the committed records."""

import pytest
import torch

from bench.cases import Case
from bench.subject import Subject
from bench.variants import VARIANTS, Config, filled, measure, table
from chopgrad import Chop, Exact
from suite.records import read_records

CASE = Case("cogvideox", 9, 16, 16, Exact(offload=False))


@pytest.mark.parametrize("name", ["checkpoint=residual", "channels last"])
def test_a_variant_is_compared_with_the_plain_decoder(name, stock_graphs):
    subject = Subject(CASE)
    plain = subject.decoder
    found = measure(subject, VARIANTS[name](plain.vae), Chop(1), Chop(1), rounds=2)
    assert subject.decoder is plain
    assert found["gradient_difference"] < 1e-4
    assert found["memory_ratio"] < 0.8 if name == "checkpoint=residual" else found["memory_ratio"] == pytest.approx(1)
    mean, low, high = found["time_ratio"]
    assert 0 < low <= mean <= high


def test_a_compiled_step_is_compiled_before_it_is_timed(monkeypatch):
    subject = Subject(CASE)
    calls = []

    def compile(step, dynamic):
        return lambda *args: calls.append(len(calls)) or step(*args)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("bench.variants.seconds", lambda subject, strategy: calls.append("timed") or 1.0)
    found = measure(subject, VARIANTS["compiled step"](subject.decoder.vae), Chop(1), Chop(1), rounds=2)
    assert calls[0] == 0 and calls[-4:] == ["timed"] * 4
    assert found["memory_ratio"] is None  # nothing sees inside compiled code on a CPU


def test_another_gradient_is_not_timed():
    subject = Subject(CASE)
    other = VARIANTS["channels last"](subject.decoder.vae)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    with pytest.raises(AssertionError, match="the gradient differs by"):
        measure(subject, other, Chop(1), Chop(1), rounds=1)


def test_the_page_shows_the_committed_records():
    page = Config().page.read_text()
    records = [r for r in read_records(Config().out) if r.settings["device"] == "cpu"]
    assert len(records) == 24 and not any(r.provenance["dirty"] for r in records)
    assert filled(page, "cpu", table(records)) == page
    changed = filled(page, "cpu", "another table")
    assert "another table" in changed and "checkpoint=block |" not in changed
    assert changed.partition("<!-- variants: cpu -->")[0] == page.partition("<!-- variants: cpu -->")[0]
    assert filled(changed, "cpu", table(records)) == page
