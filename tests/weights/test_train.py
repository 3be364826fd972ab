"""Training of the embedded decoders: an interrupted run ends where an uninterrupted one does."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoModel
from torch import nn

from tests.models import build
from weights import train
from weights.optimizers import ConvolutionMuon, optimizers
from weights.widen import widened

DIET = train.Diet.__init__


@pytest.mark.parametrize("real_share", [0.0, 0.5, 1.0])
def test_training_samples_are_seeded_by_step(real, real_share):
    diet = train.Diet(train.Config("wan2.1", size=16, real_share=real_share))
    assert len(diet.videos) == 1
    samples = [train.Diet(diet.config).batch(step, 3, 9) for step in (4, 4, 5)]
    assert samples[0].shape == (3, 3, 9, 16, 16)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0][0], samples[0][1])
    assert not torch.equal(samples[0], train.Diet(replace(diet.config, seed=1)).batch(4, 3, 9))
    assert samples[0].abs().max() <= 1
    assert all((sample[:, 1:] != sample[:, :-1]).any() for sample in samples[0])  # every one moves
    assert diet.batch(0, 2, 1).shape == (2, 3, 1, 16, 16)


AVERAGED_MUON = {"optimizer": "muon", "ema_decay": 0.5, "decay_share": 0.5, "error": "log"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("wan2.1", {}),
        ("cogvideox", {}),
        ("wan2.1", AVERAGED_MUON),
        ("wan2.1", AVERAGED_MUON | {"mixed_precision": True}),
    ],
)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(name, changes, small, tmp_path, monkeypatch):
    whole = AutoModel.from_pretrained(str(train.train(small(name, tmp_path / "whole", **changes))))
    batch = train.Diet.batch

    def interrupted(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Diet, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(small(name, tmp_path / "parts", **changes))
    out = train.train(small(name, tmp_path / "parts", **changes))
    resumed = AutoModel.from_pretrained(str(out))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    start = train.build(name, 32)
    pairs = zip(start.parameters(), resumed.parameters(), strict=True)
    assert not all(torch.equal(a.half().float(), b) for a, b in pairs)  # it is saved in float16
    record = json.loads((out / "training.json").read_text())
    assert record["provenance"]["device"]
    assert [row[0] for row in record["log"]["rows"]] == [5]
    assert record["settings"]["seed"] == 0
    assert record["train_seconds"] >= 0


def test_an_interrupted_checkpoint_leaves_the_one_before(small, tmp_path, monkeypatch):
    whole = AutoModel.from_pretrained(str(train.train(small("wan2.1", tmp_path / "whole"))))
    save, calls = torch.save, []

    def interrupted(state, path):
        calls.append(state["step"])
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(small("wan2.1", tmp_path / "parts"))
    assert calls == [1, 2, 3]
    resumed = AutoModel.from_pretrained(str(train.train(small("wan2.1", tmp_path / "parts"))))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_on_real_clips_resumes_the_same(small, real, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Diet, "__init__", DIET)
    changes = {"real_share": 0.5, "image_steps": 1, "clip_steps": 2}
    whole = AutoModel.from_pretrained(str(train.train(small("wan2.1", tmp_path / "whole", **changes))))
    with monkeypatch.context() as patch:
        patch.setattr(train, "export", lambda *_: pytest.fail("not finished"))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop_after(2, torch.nn.utils.clip_grad_norm_))
        with pytest.raises(KeyboardInterrupt):  # within a step, between backward and the optimiser
            train.train(small("wan2.1", tmp_path / "parts", **changes))
    assert not (tmp_path / "parts" / "model").exists()
    resumed = AutoModel.from_pretrained(str(train.train(small("wan2.1", tmp_path / "parts", **changes))))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def stop_after(count, function):
    calls = iter(range(count))

    def stopping(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args)

    return stopping


def test_a_finished_model_can_be_trained_further(small, tmp_path):
    first = train.train(small("wan2.1", tmp_path / "first"))
    again = train.train(small("wan2.1", tmp_path / "second", start=first, image_steps=0, clip_steps=1, seed=1))
    a, b = (AutoModel.from_pretrained(str(x)) for x in (first, again))
    difference = max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert 0 < difference < 0.01
    record = json.loads((again / "training.json").read_text())
    assert record["earlier"] == json.loads((first / "training.json").read_text())


def test_clips_that_fit_no_frame_group_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="clip_frames must be 1 more than a multiple of 8, got 6"):
        train.train(small("wan2.1", tmp_path, clip_frames=6))


def test_snapshots_hold_the_model_of_their_step(small, tmp_path):
    wanted = {"snapshot_steps": (0, 2, 5)}
    out = train.train(small("wan2.1", tmp_path, **wanted))
    folder = tmp_path / "run" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000002", "step-000005"]
    at = {n: AutoModel.from_pretrained(str(folder / f"step-{n:06d}")).state_dict() for n in (0, 2, 5)}
    assert all(value.dtype == torch.float32 for value in at[2].values())
    torch.manual_seed(0)
    untrained = train.build("wan2.1", 32).state_dict()
    finished = AutoModel.from_pretrained(str(out)).state_dict()
    after_two = train.train(small("wan2.1", tmp_path / "two", clip_steps=0))
    for name, value in AutoModel.from_pretrained(str(after_two)).state_dict().items():
        assert torch.equal(at[0][name], untrained[name])
        assert torch.equal(at[2][name].half().float(), value)
        assert torch.equal(at[5][name].half().float(), finished[name])
    assert any(not torch.equal(at[2][name], at[5][name]) for name in at[2])


@pytest.mark.parametrize("steps", [(-1,), (0, 6)])
def test_snapshots_outside_the_run_are_refused(small, tmp_path, steps):
    with pytest.raises(ValueError, match=r"snapshot_steps must lie within the run's 5 steps, got \[(-1|6)\]"):
        train.train(small("wan2.1", tmp_path, snapshot_steps=steps))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_muon_steps_a_kernel_as_the_matrix_that_it_is(layout):
    torch.manual_seed(0)
    convolution = nn.Conv3d(4, 6, 3, bias=False).to(memory_format=layout)
    kernel, gradients = convolution.weight, torch.randn(3, 6, 4, 3, 3, 3)
    matrix = nn.Parameter(kernel.detach().clone().contiguous().flatten(1))
    ours = ConvolutionMuon([kernel], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.to(memory_format=layout), gradient.flatten(1)
        ours.step()
        theirs.step()
    # Another order of the columns rounds differently, and the iteration is in bfloat16.
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_muon_and_adamw_share_the_parameters(name):
    vae = build(name, torch.float32).requires_grad_(True)
    adamw, muon = optimizers(vae, "muon", lr=1e-3)
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert sorted(map(id, [*rest, *muon.kernels])) == sorted(map(id, vae.parameters()))
    assert all(min(p.shape[0], p.numel() // p.shape[0]) == 1 for p in rest)
    assert all(p.ndim > 1 for p in muon.kernels)
    assert len(optimizers(vae, "adamw", lr=1e-3)) == 1


def test_the_average_of_the_weights_is_written(small, tmp_path):
    changes = {"image_steps": 0, "clip_steps": 3, "ema_decay": 0.75, "snapshot_steps": (1, 2, 3)}
    out = train.train(small("wan2.1", tmp_path, **changes))
    folder = tmp_path / "run" / "snapshots"
    first, second, third = (AutoModel.from_pretrained(str(folder / f"step-{n:06d}")).state_dict() for n in (1, 2, 3))
    for name, value in AutoModel.from_pretrained(str(out)).state_dict().items():
        expected = 0.75 * (0.75 * first[name] + 0.25 * second[name]) + 0.25 * third[name]
        torch.testing.assert_close(value, expected.half().float(), rtol=2e-3, atol=1e-7)


def test_the_learning_rate_is_constant_before_it_falls():
    config = train.Config("wan2.1", image_steps=1000, clip_steps=500, image_lr=1e-3, clip_lr=1e-4, decay_share=0.2)
    rate = lambda step, c=config: train.learning_rate(c, step)[0]  # noqa: E731
    assert rate(0) == pytest.approx(1e-5)
    assert rate(99) == rate(500) == rate(800) == pytest.approx(1e-3)
    assert rate(900) == pytest.approx(0.51e-3)
    assert 0 < rate(999) < 0.03e-3
    assert rate(1000) == pytest.approx(1e-6)  # the clips warm up again
    assert rate(1099) == rate(1400) == pytest.approx(1e-4)
    assert rate(1450) == pytest.approx(0.51e-4)
    longer = replace(config, clip_steps=2000)
    assert all(rate(step) == rate(step, longer) for step in range(1400))
    assert [train.learning_rate(config, step)[1] for step in (0, 500, 1000, 1250)] == [0, 0.5, 0, 0.5]
    falling = [rate(step, replace(config, decay_share=1.0)) for step in range(99, 1000)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_a_wider_model_computes_what_the_trained_one_does(name):
    trained, untrained = (train.build(name, channels).eval() for channels in (8, 12))
    untrained.load_state_dict(widened(trained.state_dict(), untrained.state_dict(), (8, 12)))
    clip = torch.randn(1, 3, 9, 32, 32)
    with torch.no_grad():
        narrow, wide = (vae.encode(clip).latent_dist for vae in (trained, untrained))
        assert wide.mean.shape[1] == 12
        torch.testing.assert_close(wide.mean[:, :8], narrow.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wide.logvar[:, :8], narrow.logvar, rtol=1e-5, atol=1e-5)
        assert wide.mean[:, 8:].std() > 1e-3  # the new latents carry something from the start
        torch.testing.assert_close(
            untrained.decode(wide.mean).sample, trained.decode(narrow.mean).sample, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("channels", "sentence"), [((12, 8), "of 12 latent channels can be given more of them, not 8")]
)
def test_a_model_is_not_made_narrower(channels, sentence):
    trained, untrained = (train.build("wan2.1", c) for c in channels)
    with pytest.raises(ValueError, match=sentence):
        widened(trained.state_dict(), untrained.state_dict(), channels)


def test_a_model_of_another_width_is_not_widened():
    with pytest.raises(ValueError, match="differ in more than their latents"):
        widened({"a": torch.zeros(3, 2)}, {"a": torch.zeros(4, 2)}, (5, 6))
