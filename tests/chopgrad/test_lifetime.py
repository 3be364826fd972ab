"""(f) Nothing of a finished group stays alive, nothing is left on the modules, and memory is flat in the frames."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import chopgrad
from chopgrad import Chop, Exact, Full
from chopgrad.memory import PeakMemory
from chopgrad.shapes import ShapesOnly
from tests.models import QWEN_SLOWLY, VAES, build, latents_for

CHOPPED = [Chop(0), Chop(1), Chop(2, block=2), Chop(1, recompute=True), Chop(0, block=2, recompute=True)]
PIECES = Chop(1, block=2, recompute=True, pieces=True)


def more_than_a_window(name, strategy):
    """Latents of a video of more groups than the strategy's first windows have; CogVideoX's groups are of two."""
    groups = 4 + strategy.block + strategy.distance
    return 2 * groups if name == "cogvideox" else groups


def setting(name, latent_frames, trainable=False):
    vae = build(name)
    vae.decoder.requires_grad_(trainable)
    z = latents_for(vae, latent_frames)
    decoder = chopgrad.decoder_for(vae)
    with torch.no_grad():
        target = torch.zeros_like(decoder.decode(z))
    return decoder, z.requires_grad_(), target


class Watched:
    """A decoder that notes, when a step begins, how many older groups' frames and states are still alive."""

    def __init__(self, decoder):
        self.decoder, self.born, self.alive = decoder, [], []
        self.step, decoder.step = decoder.step, self

    def __call__(self, z, state):
        self.alive.append(sum(any(r() is not None for r in group) for group in self.born))
        frames, state = self.step(z, state)
        self.born.append([weakref.ref(frames)])
        return frames, state


@pytest.mark.parametrize("strategy", CHOPPED, ids=str)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_frames_of_finished_groups_are_freed(name, strategy):
    """At most the window's graphs (block + distance of them) are alive when a step begins."""
    count = more_than_a_window(name, strategy)
    decoder, z, target = setting(name, count)
    watched = Watched(decoder)
    gc.disable()
    try:
        chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy)
        window = 1 if strategy.recompute else strategy.block + strategy.distance
        assert len(watched.alive) >= len(decoder.frame_groups(count))
        assert max(watched.alive) <= window
        assert not any(r() is not None for group in watched.born for r in group)  # by reference counts alone
    finally:
        gc.enable()


def test_the_watch_sees_what_full_back_propagation_keeps():
    decoder, z, target = setting("wan2.1", 6)
    watched = Watched(decoder)
    chopgrad.frame_loss(decoder, z, target, F.mse_loss, Full())
    assert max(watched.alive) == 5


def peak(name, latent_frames, strategy, trainable=False):
    decoder, z, target = setting(name, latent_frames, trainable)
    with PeakMemory() as memory:
        chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).backward()
    # The gradient of the latents is as long as the video, like the latents themselves.
    return memory.peak_bytes - z.nbytes


@pytest.mark.parametrize("strategy", [*CHOPPED, PIECES], ids=str)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_memory_does_not_depend_on_the_number_of_frames(name, strategy):
    trainable = strategy.recompute  # gradients of parameters are part of the peak either way
    count = more_than_a_window(name, strategy)
    more = 6 if name == "cogvideox" else 3  # latents of three groups
    short, long = (peak(name, n, strategy, trainable) for n in (count, count + more))
    assert long <= 1.02 * short


@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_memory_of_full_grows_with_the_number_of_frames(name):
    full, exact = peak(name, 16, Full()), peak(name, 16, Exact(offload=False))
    assert full > 1.7 * peak(name, 8, Full())
    assert exact < 0.8 * full
    assert peak(name, 16, Exact(every=4)) < exact


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_device_memory_with_offload_does_not_depend_on_the_number_of_frames(name):
    """On tensors without data, where "meta" plays the device and the CPU is the host."""

    def peaks(latent_frames, **settings):
        with ShapesOnly(), torch.device("meta"):
            decoder = chopgrad.decoder_for(VAES[name]().eval().requires_grad_(False))
            z = torch.zeros(1, 4, latent_frames, 2, 2, requires_grad=True)
            target = torch.zeros_like(decoder.decode(z))
            with PeakMemory("meta") as memory:
                chopgrad.frame_loss(decoder, z, target, F.mse_loss, Exact(offload=True, **settings)).backward()
        return memory.peak_bytes - z.nbytes, memory.host_peak_bytes

    whole, short, long = peaks(10), peaks(8, pieces=True), peaks(14, pieces=True)
    assert short[0] < 0.8 * whole[0]
    assert long[0] <= 1.02 * short[0]
    assert long[1] > short[1]
    rebuilt = peaks(14, pieces=True, every=3)
    assert rebuilt[0] <= 1.02 * short[0]
    assert rebuilt[1] < 0.9 * long[1]


def tensors_on_modules(vae):
    for module in vae.modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        yield from (x for x in tree_leaves(own) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    "strategy", [Full(), Exact(offload=False), Exact(every=2, pieces=True), *CHOPPED, PIECES], ids=str
)
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_modules_are_clean_after_success_and_after_an_error_in_the_loss(name, strategy):
    decoder, z, target = setting(name, 4)
    groups = len(decoder.frame_groups(4))
    expected = chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).item()
    assert not list(tensors_on_modules(decoder.vae))
    for fails_at in range(groups):
        calls = 0

        def loss_fn(frames, part, fails_at=fails_at):
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise RuntimeError("the user's own error")
            return F.mse_loss(frames, part)

        with pytest.raises(RuntimeError, match="the user's own error"):
            chopgrad.frame_loss(decoder, z, target, loss_fn, strategy)
        assert not list(tensors_on_modules(decoder.vae))
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()
    assert chopgrad.frame_loss(decoder, z, target, F.mse_loss, strategy).item() == expected
