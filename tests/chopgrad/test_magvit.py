"""EasyAnimate's VAE, whose caches upstream keeps on modules."""

import pytest
import torch
from torch import nn

import chopgrad
from chopgrad import Exact, Full
from tests.brute_force import relative_error
from tests.models import build, latents_for

NAMES = ["magvit", "magvit, three latents"]


def on_modules(vae):
    return [name for name, module in vae.named_modules() if getattr(module, "prev_features", None) is not None]


def frames_and_gradient(decode, z):
    leaf = z.clone().requires_grad_()
    frames = decode(leaf)
    return frames.detach(), torch.autograd.grad(frames.double().square().mean(), leaf)[0]


def gradient(decode, z):
    return frames_and_gradient(decode, z)[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_good_as_its_own_decode(name, dtype):
    vae, double = build(name, dtype), build(name)
    for p, of_vae in zip(double.parameters(), vae.parameters(), strict=True):
        p.copy_(of_vae)
    z, decoder = latents_for(vae, 5), chopgrad.decoder_for(vae)
    expected = frames_and_gradient(lambda z: double.decode(z).sample, z.double())
    stock = frames_and_gradient(lambda z: vae.decode(z).sample, z)
    for strategy in (Exact(offload=False), Exact(pieces=True)):
        ours = frames_and_gradient(lambda z, strategy=strategy: chopgrad.decode(decoder, z, strategy), z)
        for a, b, c in zip(ours, stock, expected, strict=True):
            assert a.dtype == dtype
            assert relative_error(a.double(), c) < 2 * relative_error(b.double(), c)


def test_the_latents_per_group_are_those_that_the_vae_is_set_to():
    vae = build("magvit")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 6)
    assert [g.frame_count for g in decoder.frame_groups(6)] == [1, 4, 4, 4, 4, 4]
    vae.num_latent_frames_batch_size = 2
    assert [g.frame_count for g in decoder.frame_groups(6)] == [1, 8, 8, 4]
    assert relative_error(decoder.decode(z), vae.decode(z).sample) < 1e-14


def test_what_a_failed_decode_leaves_on_modules_does_no_harm():
    vae = build("magvit")
    z = latents_for(vae, 3)
    expected = vae.decode(z).sample
    handle = vae.decoder.conv_out.register_forward_pre_hook(lambda *how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.decode(z)
    handle.remove()
    assert on_modules(vae)
    assert torch.equal(chopgrad.decoder_for(vae, check=False).decode(z), expected)
    decoder = chopgrad.decoder_for(vae)
    for decode in (decoder.decode, decoder.own_decode, lambda z: vae.decode(z).sample):
        assert torch.equal(decode(z), expected)
    assert not on_modules(vae)


def test_nothing_stays_on_modules_after_an_exception():
    vae = build("magvit")
    z = latents_for(vae, 3).requires_grad_()
    decoder = chopgrad.decoder_for(vae)
    vae.decoder.conv_act.register_forward_hook(lambda *how: 1 / 0)
    for run in (
        lambda: decoder.own_decode(z),
        lambda: decoder.decode(z),
        lambda: chopgrad.decode(decoder, z, Exact(pieces=True)),
    ):
        with pytest.raises(ZeroDivisionError):
            run()
        assert not on_modules(vae)


def test_a_sliced_batch_is_that_of_its_videos_alone():
    vae = build("magvit")
    z = latents_for(vae, 3, batch=2)
    alone = torch.cat([vae.decode(video).sample for video in z.split(1)])
    vae.enable_slicing()  # upstream starts each slice with the caches of the one before
    assert torch.equal(chopgrad.decoder_for(vae).decode(z), alone)
    with chopgrad.patch(vae, Full()):
        assert torch.equal(vae.decode(z).sample, alone)


def test_the_gradient_is_right_where_upstream_checkpoints():
    vae = build("magvit")
    z = latents_for(vae, 3)
    expected = gradient(lambda z: vae.decode(z).sample, z)
    vae.enable_gradient_checkpointing()
    decoder = chopgrad.decoder_for(vae)
    assert relative_error(gradient(lambda z: chopgrad.decode(decoder, z, Exact(offload=False)), z), expected) < 1e-12


def test_tiles_are_refused():
    vae = build("magvit")
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        chopgrad.decoder_for(vae)


class Wrapped(nn.Module):
    """As much of an adapter's layer as counts."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x)


def test_what_is_around_a_convolution_is_told():
    vae = build("magvit")
    vae.decoder.conv_in = Wrapped(vae.decoder.conv_in)
    with pytest.raises(ValueError, match="is wrapped"):
        chopgrad.decoder_for(vae)
    vae = build("magvit")
    decoder, z = chopgrad.decoder_for(vae), latents_for(vae, 2)
    plain = vae.decoder.conv_out.forward
    vae.decoder.conv_out.forward = lambda x: 2 * plain(x)
    with pytest.raises(ValueError, match=r"A hook on 'decoder\.conv_out'|is wrapped"):
        decoder.decode(z)
    with pytest.raises(ValueError, match="is wrapped"):
        chopgrad.decoder_for(vae, check=False).decode(z)
