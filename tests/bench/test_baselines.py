"""Baselines against full back-propagation on small random decoders in float64: where they are exact, and where not."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from bench.baselines import (
    FirstLatents,
    IsolatedLatents,
    SavedOnCpu,
    SpatialTiles,
    TiledDecode,
    TinyDecoder,
    UpstreamCheckpointing,
    _save_on_cpu,
    differentiate,
    tiny_vae,
)
from bench.cases import baselines, label, refusals
from chopgrad import Full
from chopgrad.memory import PeakMemory
from tests.brute_force import relative_error
from tests.models import build, latents_for
from tests.tiny_video_vae import TinyVideoVAE

COUNT = 5


def subject(name, size=2, seed=1):
    decoder = chopgrad.decoder_for(build(name), clamp=True)
    latents = latents_for(decoder.vae, COUNT, size=size, seed=seed)
    with torch.no_grad():
        target = torch.randn_like(decoder.decode(latents))
    return decoder, latents, target


def full(decoder, latents, target, loss_fn=F.mse_loss):
    leaf = latents.clone().requires_grad_()
    loss = chopgrad.frame_loss(decoder, leaf, target, loss_fn, Full())
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def run(baseline, decoder, latents, target):
    loss, (gradient,) = differentiate(baseline, decoder, latents.clone().requires_grad_(), target, F.mse_loss)
    return loss, gradient


@pytest.mark.parametrize(
    ("name", "baseline"),
    [("wan2.1", SavedOnCpu()), ("cogvideox", SavedOnCpu()), ("cogvideox", UpstreamCheckpointing())],
    ids=str,
)
def test_exact_baselines_give_the_gradient_of_full_back_propagation(name, baseline):
    decoder, latents, target = subject(name)
    assert baseline.exact
    expected, got = full(decoder, latents, target), run(baseline, decoder, latents, target)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_error(got[1], expected[1]) < 1e-10


def test_upstream_checkpointing_saves_memory_and_is_switched_off_again(stock_graphs):
    decoder, latents, target = subject("cogvideox")
    with PeakMemory() as plain:
        full(decoder, latents, target)
    with PeakMemory() as checkpointed:
        run(UpstreamCheckpointing(), decoder, latents, target)
    assert checkpointed.peak_bytes < 0.8 * plain.peak_bytes
    assert not any(getattr(m, "gradient_checkpointing", False) for m in decoder.vae.modules())


def test_wan_has_no_upstream_checkpointing():
    decoder, latents, target = subject("wan2.1")
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        run(UpstreamCheckpointing(), decoder, latents, target)
    for vae in ("wan2.1", "full:wan2.1", "full:wan2.2"):
        assert UpstreamCheckpointing() not in baselines(vae, 480, 832)
        assert any("no gradient checkpointing for Wan" in sentence for sentence in refusals(vae, 480, 832))
    assert UpstreamCheckpointing() in baselines("cogvideox", 480, 832)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox"])
def test_first_latents_is_full_back_propagation_of_the_beginning(name):
    decoder, latents, target = subject(name)
    (part,) = FirstLatents(3).parts(decoder, latents)
    assert part.frames.shape[2] == decoder.frame_count(3)
    loss, gradient = run(FirstLatents(3), decoder, latents, target)
    beginning = latents[:, :, :3], target[:, :, : decoder.frame_count(3)]
    expected = full(decoder, *beginning)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_error(gradient[:, :, :3], expected[1]) < 1e-10
    assert gradient[:, :, 3:].abs().max() == 0


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_isolated_latents_have_no_past(name):
    """T latents give T frames, each of which depends on its own latent only."""
    decoder, latents, target = subject(name)
    parts = list(IsolatedLatents().parts(decoder, latents))
    assert [p.frames.shape[2] for p in parts] == [1] * COUNT
    assert [p.where[0][0] for p in parts][:: COUNT - 1] == [0, target.shape[2] - 1]
    assert sum(p.share for p in parts) == pytest.approx(1)
    changed = latents.clone()
    changed[:, :, 1] += 1
    for k, (before, after) in enumerate(zip(parts, IsolatedLatents().parts(decoder, changed), strict=True)):
        assert torch.equal(before.frames, after.frames) == (k != 1)
    with torch.no_grad():
        plain = decoder.decode(latents)
    if name == "wan2.1":  # the first latent has no past anyway; CogVideoX's norms mix it with the rest of its group
        assert torch.equal(parts[0].frames, parts[0].of(plain))
    assert relative_error(parts[2].frames, parts[2].of(plain)) > 1e-3
    assert relative_error(run(IsolatedLatents(), decoder, latents, target)[1], full(decoder, latents, target)[1]) > 1e-3


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_spatial_tiles_cover_the_frame_and_are_exact_with_all_of_it_as_margin(name):
    """With a margin as large as the frame each tile is the whole frame, cropped."""
    decoder, latents, target = subject(name, size=4)
    seen = torch.zeros_like(target)
    for part in SpatialTiles().parts(decoder, latents):
        part.of(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(target))
    expected = full(decoder, latents, target)
    loss, gradient = run(SpatialTiles(margin=4), decoder, latents, target)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_error(gradient, expected[1]) < 1e-10
    assert relative_error(run(SpatialTiles(margin=0), decoder, latents, target)[1], expected[1]) > 1e-3


def test_upstream_tiles_give_other_frames_of_the_same_shape_and_leave_the_vae_as_it_was():
    from bench.cases import Case
    from bench.subject import Subject

    for vae in ("wan2.1", "cogvideox"):
        made = Subject(Case(vae, 9, 40, 40, TiledDecode()))
        before = {k: v for k, v in vars(made.decoder.vae).items() if k.startswith(("tile_", "use_tiling"))}
        (part,) = TiledDecode().parts(made.decoder, made.latents)
        with torch.no_grad():
            plain = made.decoder.decode(made.latents)
        assert part.frames.shape == plain.shape
        assert 1e-3 < relative_error(part.frames, plain) < 1
        after = {k: v for k, v in vars(made.decoder.vae).items() if k.startswith(("tile_", "use_tiling"))}
        assert before == after
        assert TiledDecode() not in baselines(vae, 32, 32)  # a single tile


def test_decoder_parameters_receive_their_gradient():
    decoder, latents, target = subject("wan2.1")
    decoder.vae.decoder.requires_grad_(True)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    leaf = latents.clone().requires_grad_()
    _, (_, *got) = differentiate(SavedOnCpu(), decoder, leaf, target, F.mse_loss, parameters)
    loss = F.mse_loss(decoder.decode(leaf), target)
    for a, b in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        assert relative_error(a, b) < 1e-9


def test_every_baseline_says_who_uses_it():
    for vae in ("wan2.1", "cogvideox"):
        for baseline in baselines(vae, 64, 64):
            assert label(baseline) == f"{type(baseline).__name__}()"
            assert len(type(baseline).__doc__) > 150


def test_save_on_cpu_leaves_half_of_the_host_unpinned(monkeypatch):
    """Pinned memory cannot be paged out: a machine whose memory is pinned ends processes, ours and others."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    monkeypatch.setattr("bench.baselines.available_bytes", lambda device: 2 * (2**12 + 2**11))
    x = torch.ones(768, requires_grad=True)  # 3 KiB, which PyTorch pins as 4
    with _save_on_cpu(pin_memory=True):
        y = x.exp()
        with pytest.raises(MemoryError, match="more than half of the host's free memory"):
            x.sin()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    with _save_on_cpu(pin_memory=False):
        z = sum(x.exp() for _ in range(5)).sum()
    assert torch.equal(torch.autograd.grad(z, x)[0], 5 * y.detach())


def test_a_tiny_decoder_stands_in_where_its_weights_are(tmp_path, monkeypatch):
    decoder, latents, _ = subject("wan2.1")
    sentence = "TinyDecoder(): n/a, its weights are not here (CHOPGRAD_TAEHV=taehv.py:taew2_1.pth)."
    monkeypatch.delenv("CHOPGRAD_TAEHV", raising=False)
    assert sentence in refusals("wan2.1", 480, 832)
    source, weights = tmp_path / "taehv.py", tmp_path / "w.pth"
    source.write_text(
        "import torch\nfrom tests.tiny_video_vae import TinyVideoVAE\n"
        "def TAEHV(path):\n    vae = TinyVideoVAE()\n"
        "    vae.load_state_dict(torch.load(path, weights_only=True))\n    return vae\n"
    )
    tiny = TinyVideoVAE().double()
    torch.save(tiny.state_dict(), weights)
    monkeypatch.setenv("CHOPGRAD_TAEHV", f"{source}:{weights}")
    tiny_vae.cache_clear()
    assert TinyDecoder() in baselines("wan2.1", 480, 832)
    (part,) = TinyDecoder().parts(decoder, latents)
    plain = tiny.decode_video(decoder.normalize(latents).transpose(1, 2)).transpose(1, 2)
    inside = (plain > 0) & (plain < 1)  # its own decode_video clamps
    assert relative_error(part.frames[inside], 2 * plain[inside] - 1) < 1e-6
    _, gradient = run(TinyDecoder(), decoder, latents, torch.zeros_like(part.frames))
    assert gradient.abs().max() > 0
    assert not TinyDecoder().exact
    weights.unlink()
    tiny_vae.cache_clear()
    with pytest.raises(ValueError, match="must name two files"):
        tiny_vae()
