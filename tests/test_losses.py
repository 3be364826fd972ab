"""Losses by name; LPIPS has the official weights and grows with distortion."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from chopgrad import framewise
from chopgrad.memory import PeakMemory
from suite.losses import LOSSES, VideoLPIPS, loss_by_name
from suite.motion import photographs


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips(request):
    return request.param, VideoLPIPS(request.param)


def picture():
    return photographs()[0][None, :, None, 100:228, 100:228]


def test_linear_layers_are_the_official_ones(lpips):
    net, loss = lpips
    folder = Path(find_spec("lpips").submodule_search_locations[0]) / "weights" / "v0.1"
    official = torch.load(folder / f"{net}.pth", weights_only=True, map_location="cpu")
    for i, lin in enumerate(loss.network.lins):
        assert torch.equal(lin.model[-1].weight, official[f"lin{i}.model.1.weight"])


def test_lpips_is_zero_for_the_same_picture_and_grows_with_blur_and_noise(lpips):
    _, loss = lpips
    x = picture()
    blurred = [F.avg_pool3d(x, (1, k, k), 1, (0, k // 2, k // 2)) for k in (3, 7, 15)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for distorted in (blurred, [x + s * noise for s in (0.05, 0.2, 0.6)]):
        values = [loss(y, x).item() for y in (x, *distorted)]
        assert values[0] == 0
        assert values == sorted(values)
        assert 0.05 < values[-1] < 1.6


def test_lpips_of_a_video_is_the_mean_over_its_frames(lpips):
    _, loss = lpips
    target = picture().expand(2, -1, 3, -1, -1)
    frames = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    parts = [loss(frames[:, :, i : i + 1], target[:, :, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(frames, target), torch.stack(parts).mean())


def test_gradients_reach_the_frames_and_no_weight():
    loss = loss_by_name("lpips-alex")
    frames = (0.9 * picture()).requires_grad_()
    loss(frames, picture()).backward()
    assert frames.grad.norm() > 0
    assert not any(p.requires_grad for p in loss.parameters())


def test_by_name():
    x, y = torch.randn(2, 1, 3, 2, 8, 8)
    assert loss_by_name("mse")(x, y) == F.mse_loss(x, y)
    assert loss_by_name("l1")(x, y) == F.l1_loss(x, y)
    with pytest.raises(ValueError, match=f"Unknown loss 'ssim': pass one of {', '.join(LOSSES)}"):
        loss_by_name("ssim")


def test_framewise_changes_nothing_but_memory():
    torch.manual_seed(0)
    frames = torch.randn(2, 3, 4, 16, 16, requires_grad=True)
    target = torch.randn(2, 3, 4, 16, 16)

    def perceptual(x, y):  # an activation that is kept for the backward pass
        return (x.exp().sin() - y.exp().sin()).square().mean()

    results = []
    for loss_fn in (perceptual, framewise(perceptual)):
        loss = loss_fn(frames, target)
        results.append((loss, *torch.autograd.grad(loss, frames)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with PeakMemory() as whole:
        perceptual(frames, target)
    with PeakMemory() as by_frame:
        framewise(perceptual)(frames, target)
    assert by_frame.peak_bytes < 0.5 * whole.peak_bytes
