"""PSNR, SSIM and temporal flickering against other implementations and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from suite.metrics import frames
from suite.metrics.flickering import flickering
from suite.metrics.psnr import psnr
from suite.metrics.ssim import ssim
from tests.suite.metrics.clips import blurred, noisy, real_clip


@pytest.fixture(scope="module")
def pair():
    """Two different clips and what noise and blur make of them, [2, 3, 3, 40, 52]."""
    target = torch.stack([real_clip("carphone_pristine", 3, 40, 52), real_clip("bikes", 3, 40, 52)])
    return noisy(blurred(target, 0.7), 0.05).clamp(-1, 1), target


def pictures(video):
    """[3, frames, H, W] in [-1, 1] -> frames of [H, W, 3] in [0, 1], float64."""
    return (video.double().permute(1, 2, 3, 0).numpy() + 1) / 2


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.001])
def test_psnr_of_a_constant_error(offset):
    target = torch.rand(2, 3, 2, 8, 8, dtype=torch.float64) - 0.5
    assert psnr(target + offset, target).tolist() == pytest.approx([10 * math.log10(4 / offset**2)] * 2)


def test_psnr_is_that_of_scikit_image_frame_by_frame(pair):
    expected = [
        np.mean([peak_signal_noise_ratio(t, r, data_range=1) for r, t in zip(pictures(a), pictures(b))])
        for a, b in zip(*pair)
    ]
    assert psnr(*pair).tolist() == pytest.approx(expected)


def test_psnr_is_the_mean_of_decibels_not_the_decibels_of_a_mean():
    target = torch.zeros(1, 3, 2, 4, 4, dtype=torch.float64)
    restored = target.clone()
    restored[:, :, 0] += 0.2  # 20 dB
    restored[:, :, 1] += 0.02  # 40 dB
    assert psnr(restored, target).item() == pytest.approx(30)


def test_psnr_of_a_copied_frame_is_infinite():
    target = torch.zeros(1, 3, 2, 4, 4)
    restored = target.clone()
    restored[:, :, 0] += 0.2
    assert psnr(restored, target).item() == math.inf


@pytest.mark.parametrize("pixels_at_once", [1, 5000, 2**19])
def test_ssim_is_that_of_scikit_image(pair, pixels_at_once, monkeypatch):
    monkeypatch.setattr(frames, "PIXELS_AT_ONCE", pixels_at_once)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected = [
        np.mean([structural_similarity(t, r, channel_axis=2, **settings) for r, t in zip(pictures(a), pictures(b))])
        for a, b in zip(*pair)
    ]
    assert ssim(*pair).tolist() == pytest.approx(expected, abs=1e-9)
    assert 0.5 < min(expected) < 0.97


@pytest.mark.parametrize(("x", "y"), [(0.2, 0.4), (0.0, 1.0), (0.7, 0.7)])
def test_ssim_of_flat_pictures_is_its_luminance_term(x, y):
    video = lambda level: torch.full((1, 3, 1, 12, 14), 2 * level - 1, dtype=torch.float64)  # noqa: E731
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert ssim(video(x), video(y)).item() == pytest.approx(expected)


def test_ssim_of_inverted_contrast_is_negative():
    target = noisy(torch.zeros(1, 3, 1, 32, 32), 0.3).double()
    assert ssim(target, target).item() == pytest.approx(1)
    assert ssim(-target, target).item() < -0.7


def test_ssim_refuses_a_picture_smaller_than_its_window():
    with pytest.raises(ValueError, match="SSIM needs pictures of at least 11x11 pixels, got 10x64"):
        ssim(torch.zeros(1, 3, 1, 10, 64), torch.zeros(1, 3, 1, 10, 64))


def flickering_by_vbench(picture_stack):
    """One minus the mean over frame pairs of the mean absolute difference of 8-bit pictures, as VBench prints it."""
    pairs = zip(picture_stack[:-1].astype(np.float32), picture_stack[1:].astype(np.float32))
    return (255.0 - np.mean([np.abs(a - b).mean() for a, b in pairs])) / 255.0


def test_flickering_is_that_of_vbench_on_8_bit_frames():
    rng = np.random.default_rng(0)
    stacks = rng.integers(0, 256, (2, 5, 8, 9, 3), dtype=np.uint8)
    videos = torch.from_numpy(stacks.astype(np.float32)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    expected = [flickering_by_vbench(stack) for stack in stacks]
    assert flickering(videos, videos).tolist() == pytest.approx(expected, abs=1e-6)
    assert 0.5 < expected[0] < 0.8  # a third of the range is the mean difference of two uniform numbers


@pytest.mark.parametrize("step", [0.0, 0.1, 1.0])
def test_flickering_of_alternating_brightness(step):
    video = torch.zeros(1, 3, 6, 4, 4)
    video[:, :, ::2] += step
    assert flickering(video, video).item() == pytest.approx(1 - step / 2)


def test_flickering_rewards_blur_and_looks_at_the_restored_video_alone(pair):
    restored, target = pair
    assert (flickering(blurred(target, 3), target) > flickering(target, target)).all()
    assert torch.equal(flickering(restored, target), flickering(restored, restored))


def test_flickering_needs_two_frames():
    with pytest.raises(ValueError, match="pass at least 2 frames, got 1"):
        flickering(torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 3, 1, 4, 4))
