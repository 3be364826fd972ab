"""Windows in place of a cache: HunyuanVideo, LTX, LTX-2, MiniMax-H3, Allegro; and video VAEs that have neither."""

import warnings

import diffusers
import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.decoders.unsupported import UNSUPPORTED
from chopgrad.decoders.windows import cross_fade
from chopgrad.memory import PeakMemory
from chopgrad.shapes import ShapesOnly
from chopgrad.testing import check_decoder
from tests.brute_force import relative_error
from tests.models import MORE, _ltx1, build

NAMES = ("allegro", "hunyuan video", "ltx", "ltx2", "minimax h3")
STRATEGIES = [Full(), Exact(offload=False), Exact(pieces=True), Chop(9, block=2)]
TILED = ("hunyuan video", "ltx", "ltx2")


def made(name, **settings):
    if name not in MORE:
        pytest.skip(f"this diffusers has no {name}")
    vae = build(name)
    return vae, chopgrad.decoder_for(vae, **settings)


def latents(count, size=2, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, count, size, size, generator=generator, dtype=torch.float64).to(dtype)


def gradient(frames, z):
    return torch.autograd.grad(frames.square().mean(), z)[0]


def agrees(decoder, z, strategies=STRATEGIES):
    """Frames (but for Allegro's bit for bit) and the gradient are those of the VAE's own decode."""
    z = z.clone().requires_grad_()
    theirs = decoder.own_decode(z)
    expected = gradient(theirs, z)
    allowed = 1e-14 if type(decoder).__name__ == "AllegroDecoder" else 0.0
    for strategy in strategies:
        ours = chopgrad.decode(decoder, z, strategy)
        assert relative_error(ours.detach(), theirs.detach()) <= allowed
        assert relative_error(gradient(ours, z), expected) < 1e-12
    return theirs


@pytest.mark.parametrize("name", NAMES)
def test_the_kit_finds_nothing(name):
    check_decoder(made(name)[1])


@pytest.mark.parametrize("count", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("frames", [(4, 4), (8, 8), (8, 4), (12, 4), (16, 12)])
@pytest.mark.parametrize("name", ["hunyuan video", "ltx"])
def test_any_tiles(name, frames, count):
    """Those that do not overlap, that overlap by more than half, and videos that are not tiled."""
    vae = build(name)
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = frames
    decoder = chopgrad.decoders.DECODERS[type(vae).__name__](vae)
    z = latents(count, size=1)
    with torch.no_grad():
        theirs = decoder.own_decode(z)
        assert decoder.frame_count(count) == theirs.shape[2]
        assert torch.equal(decoder.decode(z), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_spatial_tiles_too(name):
    vae, _ = made(name)
    ratio, size = vae.spatial_compression_ratio, 3
    if name == "minimax h3":
        vae.enable_tiling(2 * ratio, 2 * ratio, ratio, ratio)
    elif name != "allegro":
        size = 4
        vae.enable_tiling(3 * ratio, 3 * ratio, None, 2 * ratio, 2 * ratio)
    z = latents(6 if name == "minimax h3" else 5, size=size)
    seen = []
    hook = vae.decoder.register_forward_hook(lambda module, taken, frames: seen.append(frames.shape))
    frames = agrees(chopgrad.decoder_for(vae, check=False), z)
    assert all(shape[-1] < frames.shape[-1] for shape in seen)
    hook.remove()
    agrees(chopgrad.decoder_for(vae, checkpoint="block"), z, [Exact(offload=False)])


@pytest.mark.parametrize("name", TILED)
def test_without_windows_it_says_which_switch(name):
    vae, decoder = made(name)
    vae.use_framewise_decoding = False
    with pytest.raises(ValueError, match=r"decodes all frames at once, .* set vae.use_framewise_decoding = True"):
        chopgrad.decoder_for(vae)
    with pytest.raises(ValueError, match=r"set vae\.use_framewise_decoding = True"):
        decoder.decode(latents(4))


@pytest.mark.parametrize("frames", [(10, 8), (12, 6), (8, 12), (8, 0)])
def test_tiles_that_lose_frames_are_told(frames):
    vae, decoder = made("hunyuan video")
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = frames
    for call in (lambda: chopgrad.decoder_for(vae), lambda: decoder.decode(latents(4))):
        with pytest.raises(ValueError, match=r"would leave out or repeat frames. Set .* multiples of 4"):
            call()


def test_noise_is_told():
    vae = build("ltx")
    vae.register_to_config(decoder_inject_noise=(False, True, False, False))
    with pytest.raises(ValueError, match="adds random noise"):
        chopgrad.decoder_for(vae)


def conditioned():
    with pytest.MonkeyPatch.context() as patched:
        cls = diffusers.AutoencoderKLLTXVideo
        patched.setattr(diffusers, "AutoencoderKLLTXVideo", lambda **how: cls(**how, timestep_conditioning=True))
        torch.manual_seed(0)
        return _ltx1().double().eval().requires_grad_(False)


def test_a_decoder_that_takes_a_timestep():
    vae, z = conditioned(), latents(5, batch=2)
    with pytest.raises(ValueError, match=r"decoder_for\(vae, check=False\) and set decoder.timestep"):
        chopgrad.decoder_for(vae)
    decoder = chopgrad.decoder_for(vae, check=False)
    with pytest.raises(ValueError, match=r"set decoder\.timestep"):
        decoder.decode(z)
    decoder.timestep = 0.05
    first = agrees(decoder, z)
    decoder.timestep = 0.5
    assert not torch.equal(agrees(decoder, z), first)
    with chopgrad.patch(vae, check=False):
        vae.decode.decoder.timestep = 0.05
        assert torch.equal(vae.decode(z, torch.tensor([0.05, 0.05]).double(), return_dict=False)[0], first)
        for other in (None, torch.tensor([0.05, 0.1]).double()):
            with pytest.raises(ValueError, match=r"set vae\.decode\.decoder\.timestep to the same"):
                vae.decode(z, other)


def test_a_patched_ltx2_refuses_to_be_causal():
    vae, _ = made("ltx2")
    with chopgrad.patch(vae):
        vae.decode(latents(2), None, causal=False)  # which upstream takes for "as it is"
        with pytest.raises(ValueError, match="the decoder is not causal"):
            vae.decode(latents(2), causal=True)


def test_a_patched_allegro_puts_frames_first():
    vae, z = build("allegro"), latents(5)
    theirs = vae.decode(z).sample
    with chopgrad.patch(vae):
        assert torch.equal(vae.decode(z).sample, theirs)
        assert torch.equal(vae.decode(z, return_dict=False)[0], theirs)


def test_what_allegro_leaves_black_is_told():
    vae, decoder = made("allegro")
    assert not vae.decode(latents(6)).sample[:, 20:].any()
    for z, name in ((latents(6), "latent frames"), (latents(5, size=1), "latent rows")):
        with pytest.raises(ValueError, match=f"{name} and its own decode leaves the rest black"):
            decoder.decode(z)
    vae.kernel = (20, 8, 8)
    with pytest.raises(ValueError, match="at most twice the second"):
        decoder.frame_groups(5)
    vae.kernel = (12, 8, 8)
    vae.disable_tiling()
    with pytest.raises(ValueError, match=r"call vae.enable_tiling\(\)"):
        decoder.decode(latents(5))


def test_what_minimax_h3_cannot_decode_is_told():
    vae, decoder = made("minimax h3")
    with pytest.raises((RuntimeError, ValueError), match="non-empty list"):
        vae.decode(latents(2))
    with pytest.raises(ValueError, match="decodes at least 3 latents"):
        decoder.decode(latents(2))
    vae.register_to_config(token_drop=3)
    with pytest.raises(ValueError, match="token_drop=3 is not below"):
        decoder.frame_groups(6)


@pytest.mark.parametrize(("clip", "drop"), [(17, 3), (9, 0), (8, 1), (8, 0)])
def test_any_chunks_of_minimax_h3(clip, drop):
    made("minimax h3")
    config = dict(build("minimax h3").config) | {"clip_length": clip, "token_drop": drop}
    vae = diffusers.AutoencoderKLMiniMaxH3.from_config(config).eval()
    decoder = chopgrad.decoders.DECODERS["AutoencoderKLMiniMaxH3"](vae)
    taken = 0
    for count in range(1, 14):
        z = latents(count, size=1, dtype=torch.float32)
        try:
            decoder.frame_groups(count)
        except ValueError:
            continue
        taken += 1
        with torch.no_grad():
            theirs = decoder.own_decode(z)
            assert decoder.frame_count(count) == theirs.shape[2]
            assert torch.equal(decoder.decode(z), theirs)
    assert taken >= 11


def test_the_state_is_the_overlap_alone():
    """Of a later tile upstream's blending reads the frames that the next one overlaps, blended themselves."""
    before, frames = torch.rand(1, 1, 4, 1, 1), torch.rand(1, 1, 3, 1, 1)
    mixed = cross_fade(before, frames).flatten()
    a, b = before.flatten()[1:], frames.flatten()
    weight = torch.arange(3) / 3
    assert torch.allclose(mixed, a * (1 - weight) + b * weight)
    _, decoder = made("hunyuan video")
    groups = decoder.frame_groups(8)
    _, state = decoder.step(latents(8)[:, :, groups[0].latents], decoder.initial_state())
    assert [x.shape[2] for x in state if x is not None] == [4]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in state if x is not None)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_after_an_exception(name):
    vae, decoder = made(name)
    z = latents(5 if name == "allegro" else 6)
    expected = decoder.decode(z)
    last = [module for module in vae.decoder.modules() if any(True for _ in module.parameters(recurse=False))][-1]
    calls = []

    def fail(module, taken):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("stop")

    hook = last.register_forward_pre_hook(fail)
    names = {id(module): set(vars(module)) for module in vae.modules()}
    with pytest.raises(RuntimeError, match="stop"):
        decoder.decode(z)
    hook.remove()
    assert all(set(vars(module)) == names[id(module)] for module in vae.modules())
    assert torch.equal(decoder.decode(z), expected)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_far_from_float32_as_stock(name):
    made(name)
    z = latents(5 if name == "allegro" else 6)

    def found(dtype, ours):
        vae = build(name, dtype)
        decoder = chopgrad.decoder_for(vae)
        leaf = z.to(dtype).requires_grad_()
        frames = chopgrad.decode(decoder, leaf, Exact(offload=False)) if ours else decoder.own_decode(leaf)
        target = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.autograd.grad(F.mse_loss(frames, target), leaf)[0].float()

    exact = found(torch.float32, ours=False)
    stock = relative_error(found(torch.bfloat16, ours=False), exact)
    assert 0 < relative_error(found(torch.bfloat16, ours=True), exact) < 2 * stock


SMALL = {
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (4, 8, 8), "decode_block_out_channels": (8, 8, 8),
        "num_layers": 1, "resolution": 32, "attention_resolutions": (8,), "patch_size": 2,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32), "layers_per_block": 1, "spatial_compression_ratio": 4,
    },
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_vae_without_groups_says_what_helps(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    vae = getattr(diffusers, name)(**SMALL[name]).double().eval()
    with pytest.raises(ValueError, match=rf"{name} has no frame groups: .*enable_gradient_checkpointing\(\)"):
        chopgrad.decoder_for(vae)
    settings = {"num_frames": 3} if name == "AutoencoderKLTemporalDecoder" else {}
    shape = (3, 4, 2, 2) if settings else (1, 4, 3, 2, 2)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    plain = vae.decode(z, **settings).sample
    vae.enable_gradient_checkpointing()
    vae.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recomputed = vae.decode(z, **settings).sample
    assert relative_error(gradient(recomputed, z), gradient(plain, z)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_device_memory_does_not_depend_on_the_number_of_frames(name, stock_graphs):
    """On tensors without data, where "meta" plays the device and the CPU is the host."""
    made(name)

    def peak(latent_frames, **settings):
        with ShapesOnly(), torch.device("meta"):
            decoder = chopgrad.decoder_for(MORE[name]().eval().requires_grad_(False))
            z = torch.zeros(1, 4, latent_frames, 2, 2, requires_grad=True)
            target = torch.zeros_like(decoder.decode(z))
            with PeakMemory("meta") as memory:
                chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True, **settings)).backward()
        return memory.peak_bytes - z.nbytes

    short = peak(15)
    assert peak(21) <= 1.01 * short  # which end in as many latents
    if name not in ("allegro", "minimax h3"):  # which are one piece
        assert peak(21, pieces=True) < 0.8 * short


@pytest.mark.parametrize("name", NAMES)
def test_a_window_depends_on_the_one_before_alone(name):
    """So ``Chop(1)`` is exact, as long as tiles overlap by no more than the step; LTX's here overlap by twice that."""
    _, decoder = made(name)
    z = latents(9).requires_grad_()
    target = torch.zeros_like(decoder.decode(z)).detach()

    def error(strategy):
        loss = chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy)
        return relative_error(torch.autograd.grad(loss, z)[0], exact)

    exact = gradient(decoder.own_decode(z), z)
    reach = 2 if name == "ltx" else 1
    assert error(Chop(reach)) < 1e-12 < 1e-4 < error(Chop(reach - 1))


def test_a_timestep_is_that_of_its_call():
    """Two decodes with two timesteps before one backward pass."""
    decoder, z = chopgrad.decoder_for(conditioned(), check=False), latents(5).requires_grad_()
    losses = []
    for timestep in (0.05, 0.5):
        decoder.timestep = timestep
        losses.append(chopgrad.decode(decoder, z, Exact(offload=False)).square().mean())
    (ours,) = torch.autograd.grad(sum(losses), z)
    expected = 0
    for timestep in (0.05, 0.5):
        decoder.timestep = timestep
        expected = expected + torch.autograd.grad(decoder.own_decode(z).square().mean(), z)[0]
    assert relative_error(ours, expected) < 1e-10
