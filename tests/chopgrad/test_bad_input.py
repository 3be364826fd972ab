"""Wrong input gets one sentence that says what was passed and what to pass, before any work is lost."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.models import build, latents_for


@pytest.fixture(scope="module")
def decoder():
    return chopgrad.decoder_for(build("wan2.1"))


@pytest.fixture
def latents():
    return latents_for(build("wan2.1"), 3).requires_grad_()


@pytest.fixture
def target():
    return torch.zeros(1, 3, 5, 4, 4, dtype=torch.float64)  # 3 latents of this model decode to 5 frames


def test_unsupported_vae_lists_the_supported_classes():
    with pytest.raises(ValueError, match=r"Linear.*AutoencoderKLWan, AutoencoderKLQwenImage, AutoencoderKLCogVideoX"):
        chopgrad.decoder_for(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda z: z[0], ValueError, r"latents must be a tensor \[batch, channels.*got \[4, 3, 2, 2\]"),
        (lambda z: z.tolist(), ValueError, "latents must be a tensor.*got list"),
        (lambda z: z[:, :3], ValueError, "latents have 3 channels, but this decoder takes 4"),
        (lambda z: z.to("meta"), ValueError, "latents are on meta, but the decoder is on cpu: move one"),
        (lambda z: z.float(), TypeError, "latents are torch.float32, but the decoder is torch.float64: cast"),
        (lambda z: z.long(), TypeError, "latents must be floating point, got torch.int64"),
        (lambda z: z[:, :, :0], ValueError, "At least one latent frame is needed, got 0"),
        (lambda z: z * float("nan"), FloatingPointError, "loss of frame group 0 is nan .and of 2 more.*Check latents"),
    ],
)
def test_latents(decoder, latents, target, change, error, sentence):
    with pytest.raises(error, match=sentence):
        chopgrad.frame_loss(decoder, change(latents.detach()), target, F.mse_loss)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda t: t[:, :, :4], ValueError, "target has 4 frames, but 3 latent frames decode to 5"),
        (lambda t: t[0], ValueError, r"target must be \[batch, 3, frames, H, W\].*got \[3, 5, 4, 4\]"),
        (lambda t: object(), ValueError, "target must be a tensor or array.*got object"),
        (lambda t: t[0, 0], ValueError, r"target must be \[batch, 3, frames, H, W\].*got \[5, 4, 4\]"),
        (lambda t: t[0, 0, 0], ValueError, r"frames in its third axis.*got \[4, 4\]"),
        (
            lambda t: {"film": t, "mask": t[:, :1, :4]},
            ValueError,
            "target has 4 frames, but 3 latent frames decode to 5",
        ),
        (lambda t: t.expand(2, -1, -1, -1, -1), ValueError, "target has batch 2, but the latents have batch 1"),
        (lambda t: t.byte(), TypeError, r"target is torch.uint8.*target.float\(\) / 127.5 - 1"),
        (lambda t: t.numpy().astype(np.uint8), TypeError, r"target is torch.uint8.*127.5"),
        (lambda t: lambda frames: t[:, :, frames].int(), TypeError, r"target is torch.int32.*127.5"),
        (lambda t: lambda frames: t[:, :, :3], ValueError, "target for frames 0 to 0 has shape"),
    ],
)
def test_target(decoder, latents, target, change, error, sentence):
    with pytest.raises(error, match=sentence):
        chopgrad.frame_loss(decoder, latents, change(target), F.mse_loss)


def test_targets_of_another_size_are_the_losss_own_business(decoder, latents, target):
    seen = []

    def loss_fn(frames, part):
        seen.append(None if part is None else part.shape)
        small = F.avg_pool3d(frames, (1, 2, 2))
        return small.square().mean() if part is None else F.mse_loss(small, part)

    low = target[..., ::2, ::2]
    expected = F.mse_loss(F.avg_pool3d(decoder.decode(latents), (1, 2, 2)), low).item()
    for given in (low, None):
        assert chopgrad.frame_loss(decoder, latents, given, loss_fn).item() == pytest.approx(expected, rel=1e-12)
    assert seen == [(1, 3, n, 2, 2) for n in (1, 2, 2)] + [None] * 3
    with pytest.raises(RuntimeError, match="must match the size"), pytest.warns(UserWarning, match="target size"):
        chopgrad.frame_loss(decoder, latents, target[..., :3], F.mse_loss)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"distance": -1}, ValueError, "Chop: distance must be at least 0, got -1"),
        ({"distance": 1.0}, TypeError, "Chop: distance must be an int, got 1.0 of type float"),
        ({"distance": True}, TypeError, "Chop: distance must be an int, got True"),
        ({"distance": 1, "block": 0}, ValueError, "Chop: block must be at least 1, got 0"),
        ({"distance": 1, "block": None}, TypeError, "Chop: block must be an int, got None"),
    ],
)
def test_strategy_settings(settings, error, sentence):
    with pytest.raises(error, match=sentence):
        Chop(**settings)


def test_settings_of_exact_and_pieces():
    with pytest.raises(ValueError, match="Exact: every must be at least 1, got 0"):
        Exact(every=0)
    with pytest.raises(ValueError, match=r"Chop: pieces=True .* needs recompute=True"):
        Chop(1, pieces=True)


def test_pieces_of_a_decoder_that_has_none(decoder, latents, target):
    class Whole(chopgrad.CausalDecoder):
        latent_channels, frame_groups = decoder.latent_channels, decoder.frame_groups
        denormalize, normalize, initial_state = decoder.denormalize, decoder.normalize, decoder.initial_state

        def step(self, z, state):
            return decoder.step(z, state)

    whole = Whole(decoder.vae)
    expected = chopgrad.frame_loss(decoder, latents, target, F.mse_loss, Exact(offload=False))
    assert chopgrad.frame_loss(whole, latents, target, F.mse_loss, Exact(offload=False)) == expected
    with pytest.raises(NotImplementedError, match="Whole is not composed of pieces"):
        chopgrad.frame_loss(whole, latents, target, F.mse_loss, Exact(pieces=True))


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"strategy": 1}, TypeError, r"must be Full\(\), Chop\(distance=...\), Exact\(\) or Sampled\(...\), got 1"),
        ({"strategy": Chop}, TypeError, "strategy must be"),
        ({"context_frames": -1}, ValueError, "context_frames must be an int of at least 0, got -1"),
        ({"context_frames": 1.5}, ValueError, "context_frames must be an int of at least 0, got 1.5"),
    ],
)
def test_settings(decoder, latents, target, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        chopgrad.frame_loss(decoder, latents, target, F.mse_loss, **settings)


def test_decoder_must_be_a_causal_decoder(decoder, latents, target):
    with pytest.raises(TypeError, match=r"decoder must come from chopgrad.decoder_for\(vae\), got AutoencoderKLWan"):
        chopgrad.frame_loss(decoder.vae, latents, target, F.mse_loss)


@pytest.mark.parametrize("strategy", [Full(), Chop(0), Chop(1, block=2, recompute=True), Exact(offload=False)])
@pytest.mark.parametrize(
    ("loss_fn", "error", "sentence"),
    [
        (lambda x, y: (x - y).square(), ValueError, r"frame group 0 it returned shape \[1, 3, 1, 4, 4\]"),
        (lambda x, y: 1.0, ValueError, "frame group 0 it returned float"),
        (lambda x, y: (x - y).sum().long(), ValueError, r"returned shape \[\], torch.int64"),
        (
            lambda x, y: (x - y).sum() / (0 if x.shape[2] > 1 else 1),
            FloatingPointError,
            "loss of frame group 1 is -?(inf|nan)",
        ),
    ],
)
def test_loss(decoder, latents, target, strategy, loss_fn, error, sentence):
    with pytest.raises(error, match=sentence):
        chopgrad.frame_loss(decoder, latents, target, loss_fn, strategy)


@pytest.mark.parametrize("strategy", [Exact(offload=False), Chop(1, recompute=True)])
def test_active_dropout_is_refused_where_steps_are_repeated(latents, target, strategy):
    vae = build("wan2.1")
    next(m for m in vae.decoder.modules() if isinstance(m, torch.nn.Dropout)).p = 0.5
    decoder = chopgrad.decoder_for(vae)
    chopgrad.frame_loss(decoder, latents, target, F.mse_loss, strategy)  # in evaluation mode it is not active
    vae.train()
    with pytest.raises(ValueError, match=r"active dropout would differ.*vae.eval\(\)"):
        chopgrad.frame_loss(decoder, latents, target, F.mse_loss, strategy)
    chopgrad.frame_loss(decoder, latents, target, F.mse_loss, Chop(1))
