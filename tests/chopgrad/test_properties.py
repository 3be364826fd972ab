"""(e) Any shape and setting: the gradient agrees with brute force, or the documented error is raised."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.chopgrad.test_gradient import compare, frame_difference
from tests.models import VAES, build, latents_for

chops = st.builds(
    Chop, distance=st.integers(0, 5), block=st.integers(1, 6), recompute=st.booleans(), offload=st.booleans()
)
chops_by_pieces = st.builds(
    Chop, distance=st.integers(0, 5), block=st.integers(1, 6), recompute=st.just(True), pieces=st.just(True)
)
exacts = st.builds(Exact, offload=st.booleans(), every=st.integers(1, 7), pieces=st.booleans())
anything = st.one_of(st.just(Full()), exacts, chops, chops_by_pieces)
relaxed = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


@given(
    name=st.sampled_from(list(VAES)),
    latent_frames=st.integers(1, 6),
    batch=st.integers(1, 2),
    size=st.integers(1, 3),
    strategies=st.lists(anything, min_size=1, max_size=4),
    context_frames=st.integers(0, 6),
    clamp=st.booleans(),
    trainable=st.booleans(),
)
@settings(max_examples=25, **relaxed)
def test_every_setting_agrees_with_brute_force(
    name, latent_frames, batch, size, strategies, context_frames, clamp, trainable
):
    vae = build(name)
    vae.decoder.requires_grad_(trainable)
    z = latents_for(vae, latent_frames, batch, size)
    with torch.no_grad():
        target = torch.randn_like(chopgrad.decoder_for(vae, clamp=clamp).decode(z))

    def loss_fn(frames, part, context=None):
        return frame_difference(frames, part, context)

    compare(vae, z, target, loss_fn, strategies, context_frames, clamp)


@given(
    latent_frames=st.integers(-1, 4),
    frames=st.integers(0, 20),
    channels=st.integers(3, 5),
    distance=st.integers(-2, 2),
    block=st.integers(-1, 2),
)
@settings(max_examples=60, **relaxed)
def test_wrong_settings_raise_the_documented_errors(latent_frames, frames, channels, distance, block):
    decoder = chopgrad.decoder_for(build("wan2.1", torch.float32))
    fits = latent_frames >= 1 and channels == 4 and frames == 2 * latent_frames - 1 and distance >= 0 and block >= 1
    z = torch.zeros(1, channels, max(latent_frames, 0), 1, 1)
    target = torch.zeros(1, 3, frames, 2, 2)

    def attempt():
        return chopgrad.frame_loss(decoder, z, target, torch.nn.functional.mse_loss, Chop(distance, block))

    if fits:
        assert torch.isfinite(attempt())
    else:
        with pytest.raises(ValueError, match=r"at least|channels|frames"):
            attempt()
