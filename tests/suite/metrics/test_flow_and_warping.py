"""Optical flow, its visibility mask and the warping error on motion that is known."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage import data

from suite.metrics import flow
from suite.metrics.flow import motion_of, warp
from suite.metrics.warping import warping_error
from tests.suite.metrics.clips import blurred, noisy, real_clip

HEIGHT, WIDTH = 64, 72


def photograph(name="astronaut"):
    """Slightly softened, so that a shift by whole pixels of half the size is no worse sampled; [3, H, W]."""
    picture = getattr(data, name)()
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
    return torch.from_numpy(gaussian_filter(picture / 127.5 - 1, (1, 1, 0))).permute(2, 0, 1).float()


def panned(rows, columns, frames=3):
    """[1, 3, frames, H, W] of a photograph under a camera that moves: what is seen moves the other way."""
    photo = photograph()
    views = [photo[:, 150 + k * rows :, 180 + k * columns :][:, :HEIGHT, :WIDTH] for k in range(frames)]
    return torch.stack(views, 1)[None]


def passing_square(step=5, frames=2):
    """A square of one photograph moves right over another that stands still; and what of the latter gets covered."""
    background, square = photograph()[:, 150:, 180:][:, :HEIGHT, :WIDTH], photograph("chelsea")[:, 100:124, 100:124]
    views, covered = [], []
    for k in range(frames):
        view, mask = background.clone(), torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        left = 20 + k * step
        view[:, 20:44, left : left + 24] = square
        mask[20:44, left : left + 24] = True
        views.append(view)
        covered.append(mask)
    return torch.stack(views, 1)[None], ~covered[0] & covered[1]


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (2, 0), (-2, 3), (1, 5)])
def test_flow_of_a_pan(rows, columns):
    motion = motion_of(panned(rows, columns)[0])
    assert motion.flow.shape == (2, 2, HEIGHT, WIDTH)
    inside = motion.flow[:, :, 10:-10, 10:-10]
    error = (inside + torch.tensor([rows, columns])[:, None, None]).square().sum(1).sqrt()
    assert error.mean() < 0.1
    assert motion.visible[:, 10:-10, 10:-10].float().mean() > 0.95
    if columns > 1:
        assert not motion.visible[:, :, : columns - 1].any()  # left the picture
    elif rows > 1:
        assert not motion.visible[:, : rows - 1].any()


def test_what_gets_covered_is_not_visible_and_most_else_is():
    video, covered = passing_square()
    (visible,) = motion_of(video[0]).visible
    assert visible[covered].float().mean() < 0.35
    assert visible.float().mean() > 0.95


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, -2), (3, 5)])
def test_warp_by_whole_pixels_takes_what_lies_there(rows, columns):
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    displacement = torch.tensor([rows, columns], dtype=torch.float64)[None, :, None, None].expand(2, 2, 9, 11)
    expected = images.roll((-rows, -columns), (2, 3))[..., 3:-3, 5:-5]
    torch.testing.assert_close(warp(images, displacement)[..., 3:-3, 5:-5], expected)


def test_warp_between_pixels_is_bilinear():
    images = torch.arange(12.0).reshape(1, 1, 3, 4)
    half = torch.full((1, 2, 3, 4), 0.5)
    assert warp(images, half)[0, 0, 0, 0].item() == pytest.approx((0 + 1 + 4 + 5) / 4)


@pytest.mark.parametrize("step", [0.1, 0.4])
def test_warping_error_of_alternating_brightness_over_a_still_scene(step):
    target = panned(0, 0, frames=4)
    restored = target.clone()
    restored[:, :, ::2] += step
    assert warping_error(target, target).item() == pytest.approx(0, abs=1e-9)
    assert warping_error(restored, target).item() == pytest.approx((step / 2) ** 2, rel=1e-4)  # [0, 1], so half


def test_warping_error_follows_the_motion():
    target = panned(-2, 3)
    plain = ((target[:, :, 1:] - target[:, :, :-1]) / 2).square().mean().item()
    own = warping_error(target, target).item()
    assert own < 0.02 * plain
    restored = target.clone()
    restored[:, :, 1] += 0.2
    assert warping_error(restored, target).item() == pytest.approx(0.1**2, rel=0.1)
    frozen = target[:, :, :1].expand_as(target)  # the best flickering there is, and the wrong motion
    assert warping_error(frozen, target).item() > 0.5 * plain


def test_covered_background_does_not_count():
    video, _ = passing_square()
    motion = motion_of(video[0])
    frames = ((video[0].double() + 1) / 2).transpose(0, 1)
    everywhere = (warp(frames[1:], motion.flow.double()) - frames[:-1]).square().mean().item()
    assert warping_error(video, video).item() < 0.4 * everywhere


def test_warping_error_of_a_real_clip_grows_with_jitter_and_falls_with_blur():
    target = real_clip("carphone_pristine", 3, HEIGHT, WIDTH)[None]
    values = [warping_error(noisy(target, s), target).item() for s in (0, 0.05, 0.2)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(2 * (0.2 / 2) ** 2, rel=0.3)  # two independent noises, one of them interpolated
    assert warping_error(blurred(target, 2), target).item() < values[0]


def test_a_cut_between_all_frames_leaves_nothing_to_measure(monkeypatch):
    video = torch.zeros(1, 3, 2, 16, 16)
    gone = flow.Motion(torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool))
    monkeypatch.setattr("suite.metrics.warping.motion_of", lambda video: gone)
    assert math.isnan(warping_error(video, video).item())


def test_the_motion_of_a_clip_is_computed_once(monkeypatch):
    monkeypatch.setattr(flow, "_recent", {})
    calls = []
    monkeypatch.setattr(flow, "_flow", lambda a, b: calls.append(1) or torch.zeros(2, *a.shape))
    for _ in range(3):
        motion_of(panned(0, 1)[0])
    assert len(calls) == 4  # two pairs, both ways
    for columns in range(2, 12):
        motion_of(panned(0, columns)[0])
    assert len(flow._recent) == flow.REMEMBERED
    motion_of(panned(0, 11)[0])
    assert len(calls) == 4 * 11
    motion_of(panned(0, 1)[0])  # forgotten meanwhile
    assert len(calls) == 4 * 12


def test_the_warping_error_needs_two_frames():
    with pytest.raises(ValueError, match="pass at least 2 frames, got 1"):
        warping_error(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 1, 16, 16))
