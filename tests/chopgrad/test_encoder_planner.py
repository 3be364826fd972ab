"""Predictions of what ``encode`` takes against real runs of the same code, and the command line."""

import json
import warnings

import pytest
import torch

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from chopgrad.__main__ import main
from chopgrad.memory import PeakMemory
from chopgrad.planner import encoder as encoder_module
from chopgrad.planner import peaks, plan_encoder
from tests.models import build

FRAMES = {"cogvideox": 65}
"""Long enough that the planner extrapolates; of the others 29."""
ON_DEVICE = [Full(), Exact(offload=False), Exact(pieces=True), Chop(1), Chop(1, block=2, recompute=True)]


def size_of(name):
    return 4 * chopgrad.encoder_for(build(name), check=False).spatial_factor


def measured(name, frames, strategy, gradient):
    """Peak of a real run in float32, weights and video included."""
    vae = build(name, torch.float32).requires_grad_(gradient != "video")
    encoder = chopgrad.encoder_for(vae, checkpoint=None)
    video = torch.zeros(1, 3, frames, size_of(name), size_of(name), requires_grad=gradient != "parameters")
    sources = [x for x in (video, *encoder.parameters()) if x.requires_grad]
    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get gradients beside the video")
        moments = chopgrad.encode(encoder, video, strategy)
        torch.autograd.grad(moments.mean(), sources)
    return memory.peak_bytes + video.nbytes + sum(p.nbytes for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "gradient"), [("wan2.1", "both"), ("wan2.2", "parameters"), ("qwen", "video"), ("cogvideox", "both")]
)
def test_predictions_are_what_a_run_takes(folders, name, gradient, recwarn):
    """Strategies without offload, which the CPU does not do."""
    frames = FRAMES.get(name, 29)
    strategies = ON_DEVICE[gradient == "parameters" :: 2]
    settings = {"gradient": gradient, "dtype": torch.float32, "strategies": strategies, "checkpoint": None}
    predictions = plan_encoder(str(folders / name), frames, size_of(name), size_of(name), **settings)
    for strategy, prediction in zip(strategies, predictions, strict=True):
        truth = measured(name, frames, strategy, gradient)
        # Full's peak is at the end of the last group's backward pass where the video is long beside the features, which
        # are few here, and at its beginning in the short videos that are followed.
        assert prediction.device_bytes == pytest.approx(truth, rel=0.06 if strategy == Full() else 0.01), strategy
        assert prediction.host_bytes == 0 or prediction.host_bytes < 10_000
    assert not [w for w in recwarn if w.category is UserWarning and "gradients" in str(w.message)]


@pytest.mark.parametrize("name", ["wan2.1", pytest.param("cogvideox", marks=pytest.mark.slow)])
def test_a_few_groups_tell_what_all_groups_take(folders, name, monkeypatch):
    rebuilds = Exact(offload=True, pieces=True, every=3)  # what it keeps is counted, not followed
    settings = {"strategies": [Full(), Exact(offload=True), rebuilds, Chop(1), Chop(1, block=2, recompute=True)]}

    def found():
        size = size_of(name)
        rows = plan_encoder(str(folders / name), FRAMES.get(name, 33), size, size, checkpoint=None, **settings)
        return [(row.strategy, row.device_bytes, row.host_bytes) for row in rows]

    extrapolated = found()
    monkeypatch.setattr(peaks.Setting, "peaks", lambda self, *args: peaks.highest(self.run(*args)))
    for (strategy, device, host), (_, true_device, true_host) in zip(extrapolated, found(), strict=True):
        assert device == pytest.approx(true_device, rel=0.01 if strategy == rebuilds else 1e-3), strategy
        assert host == pytest.approx(true_host, rel=0.2 if strategy == rebuilds else 0, abs=0), strategy


def test_what_the_gradient_is_of(folders):
    settings = {"dtype": torch.float32, "strategies": [Exact(offload=True, pieces=True)], "checkpoint": None}
    both, parameters, video = (
        plan_encoder(str(folders / "wan2.1"), 33, 32, 32, gradient=of, **settings)[0].device_bytes
        for of in ("both", "parameters", "video")
    )
    weights = sum(p.nbytes for p in chopgrad.encoder_for(build("wan2.1", torch.float32)).parameters())
    # The video's gradient, and that of the group of four frames that is being added to it, with what it is made of.
    assert 33 <= (both - parameters) / (3 * 32 * 32 * 4) <= 33 + 2 * 4
    assert weights <= both - video <= 2 * weights  # their gradient, and the inputs that their convolutions keep
    with pytest.raises(ValueError, match="gradient must be 'both', 'parameters' or 'video', got 'all'"):
        plan_encoder("wan2.1", 5, 16, 16, gradient="all")
    with pytest.raises(ValueError, match="depends on its draw"):
        plan_encoder("wan2.1", 5, 16, 16, strategies=[Sampled(1, Chop(1))])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--frames": "8"}, "8 frames do not fit the encoder's groups: it takes 1 + 4k"),
        ({"--frames": "0"}, "At least one frame is needed, got 0"),
        ({"--size": "5x8"}, "Height and width must be multiples of 2, got 5x8"),
        ({"--loss": "lpips"}, "--encoder has a mean of the moments as its loss, and no decoder: leave out --loss"),
    ],
)
def test_bad_arguments(folders, capsys, change, sentence):
    options = {"--vae": str(folders / "wan2.1"), "--frames": "9", "--size": "8x8"} | change
    assert main(["plan", "--encoder", *(word for pair in options.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert sentence in err


def test_the_command_line(folders, capsys, monkeypatch):
    some = [Full(), Exact(offload=True, pieces=True), Chop(1)]
    monkeypatch.setattr(encoder_module, "default_strategies", lambda groups: some)
    arguments = ["plan", "--vae", str(folders / "wan2.1"), "--frames", "9", "--size", "8x8"]
    assert main([*arguments, "--encoder", "--budget", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "9 frames of 8x8, encoded, bfloat16, gradient of parameters and video:" in text
    assert "peak with the encoder's weights" in text
    assert "For 1GiB: Full(), 0.0 GiB." in text
    assert main([*arguments, "--encoder", "--encoder-gradient", "video", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 3
    assert main([*arguments, "--encoder-gradient", "video"]) == 2
    assert "--encoder-gradient goes with --encoder" in capsys.readouterr().err


def test_a_folder_of_another_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert main(["plan", "--encoder", "--vae", str(tmp_path), "--frames", "9", "--size", "8x8"]) == 2
    assert "is a AutoencoderKL; supported are AutoencoderKLCogVideoX" in capsys.readouterr().err
