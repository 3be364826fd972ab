"""The gradient-bias measurement on a small random VAE: right numbers, resumed runs, and clear refusals."""

import dataclasses
import json
import re
import runpy
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import chopgrad
from analysis import gradient_bias
from chopgrad import Chop
from suite.bootstrap import mean_interval
from suite.clips import seeded_crop
from suite.records import ROOT, read_record
from suite.vaes import load_vae
from tests.models import build
from tests.suite.films import write_film, write_sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE in vae/ and two videos of noise in clips/."""
    folder = tmp_path_factory.mktemp("bias")
    build("wan2.1", torch.float32).save_pretrained(folder / "vae")
    (folder / "clips").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        with av.open(str(folder / "clips" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.width, stream.height, stream.pix_fmt = 24, 24, "bgr0"
            for _ in range(11):
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="bgr0")))
            container.mux(stream.encode())
    return folder


def config(folder, out, **changes):
    settings = {"vae": str(folder / "vae"), "clips": folder / "clips", "crops": 2, "frames": 9, "size": (8, 8)}
    settings |= {"losses": ("mse", "l1"), "blocks": (1, 2), "device": "cpu", "dtype": "float64", "out": out}
    return gradient_bias.Config(**(settings | changes))


@pytest.fixture(scope="module")
def record(folder):
    gradient_bias.main(config(folder, folder / "whole.json"))
    return read_record(folder / "whole.json")


def test_the_record_describes_itself(record, folder):
    assert record.settings["vae"] == "vae"
    assert record.settings["clips"] == ["a.mkv", "b.mkv"]
    assert record.settings["groups"] == 5
    assert record.settings["distances"] == [0, 1, 2, 3, 4]
    assert record.provenance["torch"] == torch.__version__
    assert str(folder) not in json.dumps(record.settings | record.provenance)
    assert len(record.metrics["samples"]) == 4
    assert len(record.metrics["summary"]) == 2 * 2 * 5
    keys = {"loss", "block", "distance", *gradient_bias.MEASURES}
    for row in record.metrics["summary"]:
        assert set(row) == keys
        for name in gradient_bias.MEASURES:
            mean, low, high = row[name]
            assert low <= mean <= high
    keys = {"clip", "crop", "first_frame", "psnr_db", "errors", "engine_parity_relative_error"}
    assert [set(s) for s in record.metrics["samples"]] == [keys, keys - {"engine_parity_relative_error"}] * 2


def test_the_summary_is_the_mean_over_samples_with_clips_as_clusters(record):
    samples, clips = record.metrics["samples"], ["a", "a", "b", "b"]
    for row in record.metrics["summary"]:
        for name in gradient_bias.MEASURES:
            values = [s["errors"][row["loss"]][str(row["block"])][row["distance"]][name] for s in samples]
            assert row[name][0] == pytest.approx(np.mean(values))
            assert row[name] == list(mean_interval(values, clips))


def test_table_and_figure_lie_beside_the_record(record, folder):
    with Image.open(folder / "whole.png") as picture:
        picture.load()
        assert picture.size[0] > 800
        assert np.asarray(picture.convert("L")).std() > 10
    text = (folder / "whole.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["loss", "block", "distance", "absolute error"]
    # Distances 0, 1, 2, 4 without blocks, and 0 and 1 with blocks of two.
    shown = [(1, d) for d in (0, 1, 2, 4)] + [(2, 0), (2, 1)]
    assert [row[:3] for row in rows[1:]] == [[loss, str(b), str(d)] for loss in ("mse", "l1") for b, d in shown]
    by_key = {(r["loss"], str(r["block"]), str(r["distance"])): r for r in record.metrics["summary"]}
    for row in rows[1:]:
        mean, low, high = by_key[tuple(row[:3])]["relative_error"]
        assert row[4] == f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    assert len(re.findall(r"^- (mse|l1) at D = 1: relative error 0\.\d+, cosine", text, re.MULTILINE)) == 2


@pytest.mark.filterwarnings("ignore:left out")
def test_clips_that_cannot_be_used_stand_beside_the_table(folder, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(folder / "clips", clips)
    (clips / "broken.mp4").write_bytes(b"no video")
    write_sound(clips / "sound.mp4")
    write_film(clips / "short.mp4", frames=5)
    settings = config(folder, tmp_path / "x.json", clips=clips, crops=1, losses=("mse",), blocks=(1,))
    with pytest.warns(UserWarning, match="left out: 'sound.mp4' has no video stream"):
        gradient_bias.main(settings)
    record = read_record(tmp_path / "x.json")
    assert record.settings["clips"] == ["a.mkv", "b.mkv"]
    assert list(record.settings["clips_left_out"]) == ["broken.mp4", "short.mp4", "sound.mp4"]
    for text in (capsys.readouterr().out, (tmp_path / "x.md").read_text()):
        assert "- Left out: 'broken.mp4' cannot be read as a video: " in text
        assert "- Left out: 'short.mp4' has 5 frames, but 9 are needed" in text
        assert "- Left out: 'sound.mp4' has no video stream.\n" in text


@pytest.mark.parametrize(("psnr_db", "told"), [((24.0, 25.9), True), ((24.0, 26.1), False)])
def test_numbers_of_a_vae_that_cannot_draw_the_film_say_so(record, psnr_db, told):
    samples = [{"psnr_db": x} for x in psnr_db]
    found = list(gradient_bias.remarks(dataclasses.replace(record, metrics={"samples": samples})))
    assert found == ["Reconstruction is 24.9 dB, below 25 dB: these numbers mean little for training, because most of "
                     "the gradient is what this VAE cannot draw."] * told  # fmt: skip


def test_the_remark_stands_beside_the_table(record, folder):
    (remark,) = gradient_bias.remarks(record)
    assert f"\n- {remark}\n" in (folder / "whole.md").read_text()


@pytest.mark.parametrize("changes", [{"frames": 1}, {"distances": (100,)}, {"blocks": (8,)}])
def test_nothing_but_exact_gradients_can_be_shown_too(folder, tmp_path, changes):
    gradient_bias.main(config(folder, tmp_path / "x.json", crops=1, losses=("mse",), **changes))
    record = read_record(tmp_path / "x.json")
    assert all(row["relative_error"][2] < 1e-12 for row in record.metrics["summary"])
    assert (tmp_path / "x.png").exists()
    assert "error of" not in (tmp_path / "x.md").read_text()  # no verdict on rounding errors


@pytest.mark.parametrize(("distances", "kept"), [((2, 0, 2), [0, 2]), ((1, 99), [1, 4])])
def test_distances_are_sorted_and_end_at_exact(folder, tmp_path, distances, kept):
    settings = config(folder, tmp_path / "x.json", distances=distances, crops=1, losses=("mse",), blocks=(1,))
    summary = read_record(gradient_bias.measure(settings)).metrics["summary"]
    assert [row["distance"] for row in summary] == kept


def test_the_numbers_are_those_of_the_library(record, folder):
    settings = config(folder, None)
    sample = record.metrics["samples"][1]
    video, start = seeded_crop(folder / "clips" / "a.mkv", 1, settings.frames, settings.size, settings.seed)
    assert (sample["clip"], sample["crop"], sample["first_frame"]) == ("a.mkv", 1, start)
    vae = load_vae(settings.vae, dtype=torch.float64)
    decoder = chopgrad.decoder_for(vae)
    video = video.double()
    leaf = vae.encode(video).latent_dist.mode().requires_grad_()
    for loss, loss_fn in (("mse", F.mse_loss), ("l1", F.l1_loss)):
        (full,) = torch.autograd.grad(loss_fn(vae.decode(leaf).sample, video), leaf)
        for block, distance in ((1, 0), (1, 1), (2, 0), (2, 1)):
            (chopped,) = torch.autograd.grad(
                chopgrad.frame_loss(decoder, leaf, video, loss_fn, Chop(distance, block)), leaf
            )
            scale = (chopped * full).sum() / chopped.square().sum()
            errors = sample["errors"][loss][str(block)][distance]
            expected = {
                "absolute_error": (chopped - full).norm(),
                "relative_error": (chopped - full).norm() / full.norm(),
                "cosine": F.cosine_similarity(chopped.flatten(), full.flatten(), dim=0),
                "best_scaled_error": (scale * chopped - full).norm() / full.norm(),
            }
            for name, value in expected.items():
                assert errors[name] == pytest.approx(value.item(), rel=1e-6), (loss, block, distance, name)


def test_the_largest_distance_is_exact(record):
    exact = [row for row in record.metrics["summary"] if row["distance"] == 4]
    assert all(row["relative_error"][2] < 1e-12 for row in exact)
    assert all(row["relative_error"][0] > 0.1 for row in record.metrics["summary"] if row["distance"] == 0)


def test_an_interrupted_run_goes_on(record, folder, monkeypatch):
    measure_one, calls = gradient_bias._measure_one, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_one(*args, **kwargs)

    monkeypatch.setattr(gradient_bias, "_measure_one", interrupted)
    settings = config(folder, folder / "resumed.json")
    with pytest.raises(KeyboardInterrupt):
        gradient_bias.measure(settings)
    assert len(read_record(settings.out).metrics["samples"]) == 2
    gradient_bias.measure(settings)
    assert len(calls) == 3 + 2  # the two finished samples were kept
    assert read_record(settings.out).metrics == record.metrics


@pytest.mark.parametrize("changed", ["settings", "weights", "video", "commit"])
def test_samples_of_other_inputs_are_not_kept(folder, tmp_path, monkeypatch, changed):
    clips = tmp_path / "clips"
    shutil.copytree(folder / "clips", clips)
    shutil.copytree(folder / "vae", tmp_path / "vae")
    one = config(folder, tmp_path / "x.json", vae=str(tmp_path / "vae"), clips=clips, losses=("mse",), blocks=(1,))
    measure_one, calls = gradient_bias._measure_one, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_one(*args, **kwargs)

    monkeypatch.setattr(gradient_bias, "_measure_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradient_bias.measure(one)
    if changed == "settings":
        one.seed = 1
    elif changed == "weights":
        build("wan2.1", torch.float32, seed=5).save_pretrained(tmp_path / "vae")
    elif changed == "video":
        (clips / "a.mkv").write_bytes((clips / "b.mkv").read_bytes())
    else:
        provenance = gradient_bias.provenance
        monkeypatch.setattr(gradient_bias, "provenance", lambda device: provenance(device) | {"commit": "other"})
    gradient_bias.measure(one)
    assert len(calls) == 2 + 4  # all of them anew


def test_a_finished_measurement_is_done_anew(folder, tmp_path, monkeypatch):
    measure_one, calls = gradient_bias._measure_one, []
    monkeypatch.setattr(gradient_bias, "_measure_one", lambda *a, **k: calls.append(1) or measure_one(*a, **k))
    settings = config(folder, tmp_path / "x.json", crops=1, losses=("mse",), blocks=(1,))
    for _ in range(2):
        gradient_bias.measure(settings)
    assert len(calls) == 2 * 2


def test_a_library_that_differs_from_its_definition_is_noticed(folder, tmp_path, monkeypatch):
    frame_loss = chopgrad.frame_loss
    monkeypatch.setattr(chopgrad, "frame_loss", lambda *args: 1.01 * frame_loss(*args))
    with pytest.raises(AssertionError, match=r"frame_loss differs from the pairwise gradients by 1.0e-02"):
        gradient_bias.measure(config(folder, tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--frames", "8"], "error: 8 frames fit no number of latents of this VAE: pass 7 or 9."),
        (["--distances", "-1"], "error: Distances must be at least 0"),
        (["--size", "9", "8"], "error: Crops of 9x8 pixels come back from this VAE as 8x8: pass --size 8 8."),
        (["--size", "1", "1"], "error: This VAE cannot encode 1x1 pixels"),
        (["--crops", "0"], "error: At least one crop"),
        (["--blocks"], "error: At least one crop, pixel, loss and block is needed"),
        (["--losses"], "error: At least one crop, pixel, loss and block is needed"),
        (["--device", "cuda:99"], "error: No VAE could be loaded"),
        (["--clips", "{tmp}/empty"], "error: No video in "),
        (["--clips", "{tmp}/absent"], "error: --clips must be a folder of videos"),
        (["--clips", "{tmp}/broken"], "error: 'x.mp4' cannot be read as a video"),
        (["--vae", "{tmp}/empty"], "error: '.*' has no config.json"),
    ],
)
def test_the_script_ends_in_one_sentence(folder, tmp_path, monkeypatch, words, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.mp4").write_bytes(b"no video")
    good = ["--vae", str(folder / "vae"), "--clips", str(folder / "clips"), "--out", str(tmp_path / "x.json")]
    good += ["--frames", "9", "--size", "8", "8", "--losses", "mse", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gradient_bias.py", *good, *(w.format(tmp=tmp_path) for w in words)])
    with pytest.raises(SystemExit, match=sentence) as end:
        runpy.run_path(str(ROOT / "analysis" / "gradient_bias.py"), run_name="__main__")
    assert "\n" not in str(end.value)
    assert not (tmp_path / "x.json").exists()


def test_the_script_measures(folder, tmp_path, monkeypatch, capsys):
    words = ["--vae", str(folder / "vae"), "--clips", str(folder / "clips"), "--out", str(tmp_path / "x.json")]
    words += ["--frames", "9", "--size", "8", "8", "--losses", "mse", "--crops", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "analysis" / "gradient_bias.py"), *words])
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert "Written: x.json, x.md, x.png" in capsys.readouterr().out
    command = read_record(tmp_path / "x.json").provenance["command"]
    assert command.startswith("python analysis/gradient_bias.py --vae vae --clips clips --out x.json --frames 9")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 8}, "8 frames fit no number of latents of this VAE: pass 7 or 9"),
        ({"frames": 41}, "'a.mkv' has 11 frames, but 41 are needed"),
        ({"distances": (-1, 0)}, "Distances must be at least 0"),
        ({"blocks": (0,)}, "blocks at least 1"),
        ({"losses": ("psnr",)}, "Unknown loss 'psnr'"),
        ({"vae": "nowhere-at-all"}, "No VAE could be loaded"),
    ],
)
def test_bad_settings(folder, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        gradient_bias.measure(config(folder, tmp_path / "x.json", **changes))
    assert not list(tmp_path.iterdir())
