"""Reconstruction of the packaged clips and of a folder, without what cannot be read there."""

import pytest
import torch

from suite.records import read_record
from tests.models import build
from tests.suite.films import write_film, write_sound
from weights import evaluate


@pytest.mark.filterwarnings("ignore:left out")
def test_a_folder_is_evaluated_without_what_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "TRAINING_CLIPS", ("bikes",))
    build("wan2.1", torch.float32).save_pretrained(tmp_path / "vae")
    write_film(tmp_path / "clips" / "good.mp4", frames=6)
    write_film(tmp_path / "clips" / "short.mp4", frames=4)
    write_sound(tmp_path / "clips" / "sound.mp4")
    settings = {"clips": tmp_path / "clips", "crops": 2, "frames": 5, "sizes": (16, 24), "device": "cpu"}
    evaluate.main(evaluate.Config(str(tmp_path / "vae"), **settings, out=tmp_path / "x.json"))
    record = read_record(tmp_path / "x.json")
    rows = record.metrics["clips"]
    assert [(row["clip"], row["split"]) for row in rows[::2]] == [
        ("bikes.mp4", "trained"), ("carphone_pristine.mp4", "held out"), ("good.mp4", "held out"),
    ]  # fmt: skip
    assert [row["size"] for row in rows] == [16, 24] * 3
    assert all(len(row["psnr_db_per_crop"]) == 2 for row in rows)
    assert list(record.settings["clips_left_out"]) == ["short.mp4", "sound.mp4"]
    for text in (capsys.readouterr().out, (tmp_path / "x.md").read_text()):
        assert "Left out: 'short.mp4' has 4 frames, but 5 are needed" in text
        assert "Left out: 'sound.mp4' has no video stream." in text
