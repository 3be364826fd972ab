"""Checkpointing inside a group: the same frames and gradients under every strategy, with less memory."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled
from chopgrad.decoders.wan import WanDecoder
from chopgrad.memory import PeakMemory
from tests.chopgrad.test_gradient import case, compare
from tests.models import QWEN_SLOWLY, VAES, build, latents_for

MODES = ["block", "residual", "frame"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_every_strategy_against_brute_force(name, mode):
    vae, z, target = case(name, 4)
    strategies = [
        Full(),
        Exact(offload=False),
        Exact(pieces=True),
        Chop(1),
        Chop(2, block=2),
        Chop(1, block=2, recompute=True),
    ]
    compare(vae, z, target, F.mse_loss, strategies, checkpoint=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_in_an_ordinary_graph(name, mode):
    vae = build(name)
    vae.decoder.requires_grad_(True)
    z = latents_for(vae, 4).requires_grad_()

    def result(checkpoint):
        frames = chopgrad.decoder_for(vae, checkpoint=checkpoint).decode(z)
        used = [p for p in chopgrad.decoder_for(vae).parameters() if p.requires_grad]
        return frames, torch.autograd.grad(frames.square().sum(), [z, *used], allow_unused=True)

    frames, gradients = result(mode)
    plain, expected = result(None)
    # Frame by frame a convolution of the upsampler may add up in another order.
    tolerance = 1e-12 if mode == "frame" else 0.0
    torch.testing.assert_close(frames, plain, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_memory_falls_with_the_size_of_what_is_recomputed(name, stock_graphs):
    def peak(checkpoint):
        vae = build(name)
        z = latents_for(vae, 5, size=4).requires_grad_()
        decoder = chopgrad.decoder_for(vae, checkpoint=checkpoint)
        target = torch.zeros_like(decoder.decode(z.detach()))
        with PeakMemory() as memory:
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, Full()).backward()
        return memory.peak_bytes

    plain = peak(None)
    assert peak("block") < 0.8 * plain
    assert peak("residual") < 0.8 * plain
    assert peak("frame") < 0.9 * plain  # without the float32 copies that it spares in lower precision


@pytest.mark.parametrize(
    ("strategy", "of_use", "meaning"),
    [(Exact(pieces=True), True, "frame"), (Exact(pieces=True), False, None), (Full(), True, None)],
    ids=["pieces", "pieces of a class whose norms keep little", "full"],
)
def test_left_out_it_goes_frame_by_frame_where_pieces_are_walked(strategy, of_use, meaning, stock_graphs, monkeypatch):
    monkeypatch.setattr(WanDecoder, "recomputes_frames", of_use)
    vae = build("wan2.1")
    z = latents_for(vae, 4, size=4).requires_grad_()

    def peak(*checkpoint):
        with PeakMemory() as memory:
            chopgrad.decode(chopgrad.decoder_for(vae, True, *checkpoint), z, strategy).sum().backward()
        return memory.peak_bytes

    peaks = {mode: peak(mode) for mode in ("auto", None, "frame")}
    assert peak() == peaks["auto"] == peaks[meaning]
    assert peaks["frame"] < peaks[None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", [Full(), Chop(1), Exact(pieces=True)], ids=str)
def test_under_autocast(strategy, mode):
    vae = build("wan2.1", torch.float32)
    vae.decoder.requires_grad_(True)
    z = latents_for(vae, 4)
    target = torch.zeros_like(chopgrad.decoder_for(vae).decode(z).detach())

    def gradients(checkpoint, half=True):
        leaf = z.clone().requires_grad_()
        decoder = chopgrad.decoder_for(vae, checkpoint=checkpoint)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
        return torch.autograd.grad(loss, [leaf, vae.decoder.conv_out.weight])

    for got, plain, true in zip(gradients(mode), gradients(None), gradients(None, half=False), strict=True):
        if mode == "frame":  # on one frame or on many, some CPUs' kernels sum in another order
            assert (got - true).norm() < 1.5 * (plain - true).norm()
        else:
            torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-7)


def test_blocks_and_pieces_are_the_same_chain():
    for name in VAES:
        decoder = chopgrad.decoder_for(build(name))
        flat = [piece for block in decoder.blocks() for unit in block for piece in unit]
        assert len(flat) == len(decoder.pieces()) == len(decoder.initial_state())
        assert len(decoder.blocks()) < sum(map(len, decoder.blocks())) < len(flat)


def test_bad_settings():
    vae = build("wan2.1")
    with pytest.raises(ValueError, match=r"must be 'auto', 'frame', 'residual', 'block' or None, got 'piece'"):
        chopgrad.decoder_for(vae, checkpoint="piece")
    z = latents_for(vae, 3).requires_grad_()
    target = torch.zeros_like(chopgrad.decoder_for(vae).decode(z.detach()))
    for module in vae.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    vae.train()
    for decoder, strategy in [
        (chopgrad.decoder_for(vae, checkpoint="block"), Full()),
        (chopgrad.decoder_for(vae), Exact(pieces=True)),
        (chopgrad.decoder_for(vae), Sampled(1, Exact(offload=False))),
    ]:
        with pytest.raises(ValueError, match="active dropout would differ"):
            chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy)
