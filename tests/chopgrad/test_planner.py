"""Predictions against real runs of the same code, and the command line."""

import itertools
import json
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.__main__ import main
from chopgrad.memory import PeakMemory
from chopgrad.planner import ARCHITECTURES, Prediction, default_strategies, peaks, plan, recommend, relative_compute
from chopgrad.planner import prediction as prediction_module
from chopgrad.planner.loss_shapes import loss_shapes
from tests.linear_decoder import LinearDecoder
from tests.models import VAES, build

ON_DEVICE = [
    Full(),
    Exact(offload=False),
    Exact(pieces=True),
    Chop(2),
    Chop(1, block=2),
    Chop(1, block=2, recompute=True),
]


def measured(name, latents, shape, strategy, *, loss, frames_loss, trainable):
    """Peak of a real run in float32, weights and latents (of shape ``latents``) included; ``shape`` is the video's.

    The target of a streamed loss is made group by group, that of a whole video's at once.
    """
    vae = build(name, torch.float32)
    decoder = chopgrad.decoder_for(vae.requires_grad_(trainable), checkpoint=None)
    z = torch.zeros(latents, requires_grad=True)
    loss_of = loss_shapes(loss, tuple(shape[3:]), torch.float32)
    sources = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get gradients beside the latents")

        def loss_fn(frames, target):
            return loss_of(frames, target).clone()  # mse_loss on the CPU returns a scalar in a video's storage

        if frames_loss == "streamed":

            def target(frames):
                return torch.zeros(*shape[:2], frames.stop - frames.start, *shape[3:])

            value = chopgrad.frame_loss(decoder, z, target, loss_fn, strategy)
        else:
            target = torch.zeros(shape)
            frames = chopgrad.decode(decoder, z, strategy)
            value = loss_fn(frames, target)
        torch.autograd.grad(value, sources)
    return memory.peak_bytes + z.nbytes + sum(p.nbytes for p in decoder.parameters())


FORMS = ["streamed", "whole"]
EVERY_CASE = [*itertools.product(VAES, ["mse"], [False, True], FORMS), *(("wan2.2", "lpips", False, f) for f in FORMS)]
IN_SHORT = [
    *itertools.product(["wan2.1"], ["mse"], [True], FORMS),
    ("wan2.1", "mse", False, "streamed"),
    ("cogvideox", "mse", False, "streamed"),
    ("wan2.2", "mse", True, "whole"),
]
"""Each VAE and form, and a decoder that trains with both: the rest takes minutes."""


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "loss", "trainable", "frames_loss", "every_strategy"),
    [*((*case, False) for case in IN_SHORT), *(slow(*case, True) for case in EVERY_CASE)],
)
def test_predictions_are_what_a_run_takes(folders, name, loss, trainable, frames_loss, every_strategy, recwarn):
    """A video long enough that the planner extrapolates. Strategies without offload, which the CPU does not do."""
    form = {"loss": loss, "frames_loss": frames_loss}
    latents = (1, 4, 16 if name == "cogvideox" else 8, 2, 2)  # CogVideoX's groups are of two latents
    with torch.no_grad():
        shape = chopgrad.decoder_for(build(name, torch.float32)).decode(torch.zeros(latents)).shape
    strategies = ON_DEVICE[:: 3 if trainable else 2 if loss == "lpips" else 1]
    if not every_strategy and len(strategies) == len(ON_DEVICE):
        strategies = strategies[frames_loss == "whole" :: 2]
    settings = {"dtype": torch.float32, "trainable_decoder": trainable, "strategies": strategies, "checkpoint": None}
    predictions = plan(str(folders / name), *shape[2:], **settings, **form)
    for strategy, prediction in zip(strategies, predictions, strict=True):
        truth = measured(name, latents, shape, strategy, trainable=trainable, **form)
        assert prediction.device_bytes == pytest.approx(truth, rel=0.02), strategy
        assert prediction.host_bytes == 0 or prediction.host_bytes < 10_000
    assert not [w for w in recwarn if w.category is UserWarning and "gradients" in str(w.message)]


def bytes_of(folder, name, count, **settings):
    """{(strategy, checkpoint): (device, host) bytes} of the default strategies for ``count`` latents."""
    frames = chopgrad.decoder_for(build(name)).frame_count(count)
    size = 16 if settings.get("loss") == "lpips" else {"wan2.1": 4, "cogvideox": 8}[name]
    rows = plan(str(folder / name), frames, size, size, dtype=torch.float32, **settings)
    return {(p.strategy, p.checkpoint): (p.device_bytes, p.host_bytes) for p in rows}


EVERY_KIND = [
    Full(),
    Exact(offload=True),
    Exact(offload=True, pieces=True, every=3),
    Chop(1),
    Chop(1, block=2, recompute=True),
    Chop(1, offload=True),
    Chop(1, block=2, offload=True),
]


@pytest.mark.parametrize(
    ("name", "trainable", "strategies"),
    [
        ("wan2.1", False, EVERY_KIND[::2]),
        ("cogvideox", True, EVERY_KIND[1::2]),
        slow("wan2.1", True, EVERY_KIND[1::2]),
        slow("cogvideox", False, EVERY_KIND[::2]),
    ],
)
def test_working_operators_out_once_changes_no_byte(folders, name, trainable, strategies, monkeypatch):
    """The planner's own tensors against PyTorch's fake ones, which work out every operator."""
    settings = {"trainable_decoder": trainable, "strategies": strategies}
    count = 3 if name == "wan2.1" else 4
    found = bytes_of(folders, name, count, **settings)
    monkeypatch.setattr(prediction_module, "ShapesOnly", FakeTensorMode)
    assert bytes_of(folders, name, count, **settings) == found


@pytest.mark.parametrize(
    ("name", "count", "loss", "frames_loss", "strategies"),
    [
        ("wan2.1", 8, "mse", "streamed", EVERY_KIND[::2]),
        ("cogvideox", 16, "mse", "whole", EVERY_KIND[1::2]),
        slow("wan2.1", 7, "lpips", "whole", EVERY_KIND[1::2]),
        slow("wan2.1", 8, "mse", "whole", EVERY_KIND),
        slow("wan2.1", 8, "mse", "streamed", EVERY_KIND[1::2]),
        slow("cogvideox", 16, "mse", "streamed", EVERY_KIND),
        slow("wan2.1", 7, "lpips", "streamed", EVERY_KIND[1::2]),
    ],
)
def test_a_few_groups_tell_what_all_groups_take(folders, name, count, loss, frames_loss, strategies, monkeypatch):
    settings = {"strategies": strategies, "checkpoint": None, "loss": loss, "frames_loss": frames_loss}
    found = bytes_of(folders, name, count, **settings)
    monkeypatch.setattr(peaks.Setting, "peaks", lambda self, *args: peaks.highest(self.run(*args)))
    for key, (device, host) in bytes_of(folders, name, count, **settings).items():
        rebuilds = key[0] == Exact(offload=True, pieces=True, every=3)  # what it keeps is counted, not followed
        assert found[key][0] == pytest.approx(device, rel=0.01 if rebuilds else 2e-4), key
        assert found[key][1] == pytest.approx(host, rel=0.2 if rebuilds else 0, abs=0), key


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_offloading_moves_states_to_the_host(folders, name):
    frames = chopgrad.decoder_for(build(name)).frame_count(24)
    size = {"wan2.1": 4, "cogvideox": 8}[name]
    strategies = [Exact(offload=False), Exact(offload=True), Exact(offload=True, every=4)]
    kept, offloaded, rebuilt = plan(str(folders / name), frames, size, size, dtype=torch.float32, strategies=strategies)
    assert offloaded.device_bytes < kept.device_bytes
    assert offloaded.host_bytes > 0.5 * (kept.device_bytes - offloaded.device_bytes)
    assert rebuilt.host_bytes < 0.7 * offloaded.host_bytes  # the adjoints of all frames wait there as before
    assert rebuilt.device_bytes == pytest.approx(offloaded.device_bytes, rel=0.02)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_offloading_moves_graphs_to_the_host(folders, name, stock_graphs):
    strategies = [Chop(1), Chop(3), Chop(1, offload=True), Chop(3, offload=True)]
    size = {"wan2.1": 4, "cogvideox": 8}[name]
    frames = chopgrad.decoder_for(build(name)).frame_count(16)
    vae = str(folders / name)
    for trainable in (False, True):
        two, four, two_away, four_away = plan(
            vae, frames, size, size, dtype=torch.float32, strategies=strategies, trainable_decoder=trainable
        )
        assert two_away.device_bytes < two.device_bytes
        assert four_away.device_bytes - two_away.device_bytes < 0.2 * (four.device_bytes - two.device_bytes)
        assert four_away.host_bytes == pytest.approx(2 * two_away.host_bytes, rel=0.05)
        # Less leaves the device than lies on the host: what a graph saves twice is there twice.
        assert two.device_bytes - two_away.device_bytes < two_away.host_bytes


@pytest.mark.parametrize("frames_loss", FORMS)
@pytest.mark.parametrize(
    "strategy",
    [Full(), Exact(offload=False), Exact(every=5), Chop(0), Chop(2), Chop(2, 4), Chop(1, 4, recompute=True)]
    + [Exact(pieces=True), Exact(pieces=True, every=5)]
    + [Chop(d, w, recompute=True, pieces=True) for d in (0, 1, 3) for w in (1, 4)],
    ids=str,
)
def test_compute_counts_the_passes_of_the_engine(strategy, frames_loss):
    """Against the number of times that a long video's groups are really run through the first piece."""
    decoder, z = LinearDecoder(0.5), torch.zeros(1, 4, 40, 1, 1, dtype=torch.float64, requires_grad=True)
    (first, *rest), calls = decoder.pieces(), []
    decoder.pieces = lambda: [lambda *args: calls.append(1) or first(*args), *rest]
    if frames_loss == "streamed":
        loss = chopgrad.frame_loss(decoder, z, torch.zeros(1, 3, 40, 1, 1), F.mse_loss, strategy)
    else:
        loss = chopgrad.decode(decoder, z, strategy).square().mean()
    loss.backward()
    block = strategy.plan().block or 40
    backwards = 1 + strategy.plan().distance / block
    forwards = 3 * relative_compute(strategy, 40, frames_loss) - 2 * backwards
    assert len(calls) / 40 == pytest.approx(forwards, rel=0.05)


def prediction(device, compute, distance):
    return Prediction(Full(), device, 0, compute, distance)


@pytest.mark.parametrize(("budget", "expected"), [(100, 0), (50, 1), (25, 2), (15, 3), (5, None)])
def test_recommendation(budget, expected):
    """The cheapest exact one that fits; else the largest distance; else nothing."""
    choices = [prediction(90, 1.0, None), prediction(40, 1.5, None), prediction(20, 1.6, 2), prediction(10, 1.2, 1)]
    assert recommend(choices, budget) == (None if expected is None else choices[expected])


def test_recommendation_of_equals_and_with_little_host_memory():
    large, small = prediction(15, 1.67, None), prediction(10, 1.67, None)
    host, truncated = Prediction(Full(), 10, 40, 1.32, None), prediction(9, 1.0, 1)
    assert recommend([large, small], 20) is small
    assert recommend([large], 15) is None  # a prediction may be off
    assert recommend([small, host], 20) is host
    assert recommend([small, host], 20, 80) is host
    assert recommend([small, host], 20, 79) is small  # pinned memory may take twice as much
    assert recommend([truncated, host], 20, 79) is truncated


@pytest.mark.parametrize(
    ("strategy", "distance"), [(Chop(1, block=4), None), (Chop(0, block=5), None), (Chop(1, block=3), 1), (Chop(3), 3)]
)
def test_a_window_over_all_groups_is_exact(folders, strategy, distance):
    decoder = chopgrad.decoder_for(build("wan2.1"))
    z = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    video = torch.zeros_like(decoder.decode(z).detach())
    wanted, got = (
        torch.autograd.grad(chopgrad.frame_loss(decoder, z, video, F.mse_loss, s), z)[0] for s in (Full(), strategy)
    )
    same = (got - wanted).norm() < 1e-12 * wanted.norm()
    (found,) = plan(str(folders / "wan2.1"), *video.shape[2:], strategies=[strategy], checkpoint=None)
    assert found.distance == distance
    assert same == (distance is None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--frames": "8"}, "No number of latents decodes to 8 frames: pass 7 or 9"),
        ({"--frames": "0"}, "frames must be at least 1, got 0"),
        ({"--size": "5x8"}, "Height and width must be multiples of 2, got 5x8"),
        ({"--size": "big"}, "--size must be HEIGHTxWIDTH in pixels, such as 720x1280; got 'big'"),
        ({"--budget": "24"}, "--budget must be a number with a unit, such as 24GiB; got '24'"),
        ({"--host-budget": "x"}, "--host-budget must be a number with a unit, such as 24GiB; got 'x'"),
        (
            {"--vae": "nowhere"},
            "No config was found for 'nowhere': pass wan2.1, wan2.2, qwen-image, cogvideox, a folder",
        ),
    ],
)
def test_bad_arguments(folders, capsys, change, sentence):
    options = {"--vae": str(folders / "wan2.1"), "--frames": "9", "--size": "8x8"} | change
    assert main(["plan", *(word for pair in options.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert sentence in err


def test_a_folder_of_another_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert main(["plan", "--vae", str(tmp_path), "--frames", "9", "--size", "8x8"]) == 2
    assert "is a AutoencoderKL; supported are AutoencoderKLWan" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"chopgrad {chopgrad.__version__}\n"


def test_the_command_line(folders, capsys, monkeypatch):
    some = [Full(), Exact(offload=True, pieces=True), Chop(1)]
    assert set(some) <= set(default_strategies(2))
    monkeypatch.setattr(prediction_module, "default_strategies", lambda groups: some)
    arguments = ["plan", "--vae", str(folders / "wan2.1")]
    one = [*arguments, "--frames", "1", "--size", "16x16", "--loss", "lpips", "--budget", "1GiB"]
    assert main(one) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Full()")]
    assert main([*one, "--all"]) == 0
    text = capsys.readouterr().out
    assert "| Chop(1)" in text
    assert "For 1GiB: Full(), 0.0 GiB." in text
    assert "6 % more than the column" in text
    assert "Left out: cuDNN workspaces" in text
    arguments += ["--frames", "3", "--size", "4x4"]
    assert main([*arguments, "--loss", "mse", "--frames-loss", "whole", "--checkpoint", "none"]) == 0
    assert ", mse on the whole video, bfloat16:" in capsys.readouterr().out
    assert main([*arguments, "--json", "--trainable-decoder", "--budget", "1KiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["predictions"]) == len(some)
    assert found["recommended"] is None
    assert main([*arguments, "--checkpoint", "none", "--budget", "1KiB", "--host-budget", "1KiB"]) == 0
    assert "Nothing fits 1KiB and 1KiB on the host; the least on the device is" in capsys.readouterr().out
    assert all(row["device_bytes"] > 0 for row in found["predictions"])


def test_progress_is_told_on_a_terminal_only(folders, capsys, monkeypatch):
    monkeypatch.setattr(prediction_module, "default_strategies", lambda groups: [Full(), Exact(pieces=True), Chop(1)])
    arguments = ["plan", "--vae", str(folders / "wan2.1"), "--frames", "3", "--size", "8x8", "--checkpoint", "none"]
    assert main(arguments) == 0
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments) == 0
    told = capsys.readouterr().err.split("\r\x1b[K")
    assert told == ["", "reading the architecture ...", "predicting ...", ""]
    seen = []
    plan(str(folders / "wan2.1"), 3, 8, 8, strategies=[Full(), Chop(1)], progress=lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_whole_video_takes_its_frames_more(folders):
    """Frames, target and the frames' gradient beside a sweep that is the same; nothing else grows with the video."""
    strategies, z = [Exact(offload=True), Chop(1)], 16
    frames = chopgrad.decoder_for(build("wan2.1")).frame_count(z)
    settings = {"dtype": torch.float32, "strategies": strategies, "checkpoint": None}
    pairs = [plan(str(folders / "wan2.1"), frames, 32, 32, frames_loss=form, **settings) for form in FORMS]
    for streamed, whole in zip(*pairs, strict=True):
        video = 3 * frames * 32 * 32 * 4
        assert 2 * video < whole.device_bytes - streamed.device_bytes < 4 * video
    assert pairs[1][0].relative_compute > pairs[0][0].relative_compute  # no group is swept at once
    assert pairs[1][1].relative_compute == pytest.approx(pairs[0][1].relative_compute + 1 / 3)
    with pytest.raises(ValueError, match="frames_loss must be 'streamed' or 'whole', got 'half'"):
        plan(str(folders / "wan2.1"), frames, 32, 32, frames_loss="half")


def test_named_architectures_are_built():
    """In every supported version of diffusers."""
    for name in ARCHITECTURES:
        (row,) = plan(name, 9, 64, 64, strategies=[Chop(0)])
        assert row.device_bytes > 2**20


@pytest.mark.slow
@pytest.mark.parametrize("vae", ["wan2.1", "wan2.2", "qwen-image", "cogvideox"])
def test_full_size_architectures(vae):
    """The published architectures at 480x832: exact by pieces with offload needs less than the paper's D = 1."""
    strategies = [Exact(offload=True, pieces=True), Chop(1), Full()]
    by_pieces, paper, full = plan(vae, 97, 480, 832, strategies=strategies)
    assert by_pieces.device_bytes < paper.device_bytes < full.device_bytes
