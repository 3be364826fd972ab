"""LPIPS and DISTS: known values, the definition in float64, and no reach for a hub."""

import numpy as np
import pytest
import torch
from skimage import data
from torch.nn import functional as F

from suite.metrics import frames
from suite.metrics.dists import dists
from suite.metrics.lpips import lpips_alex, lpips_vgg
from suite.networks import dists as dists_file
from suite.networks.dists import ALPHA_BETA, VGG, VideoDISTS
from suite.networks.lpips import LPIPS_FILES, VideoLPIPS
from suite.networks.wheel_weights import read_arrays, wheel_file
from tests.suite.metrics.clips import blurred, needs, noisy, real_clip

BLURS = (0.5, 1, 2, 4)


def face():
    """The first frame of the held-out clip at its own size, [1, 3, 1, 144, 176]."""
    return real_clip("carphone_pristine", 1, 144, 176)[None]


def crops(name, *corners, size=96):
    """Square crops of a photograph of scikit-image, each [1, 3, 1, size, size] in [-1, 1]."""
    picture = getattr(data, name)()
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
    video = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    return [video[..., y : y + size, x : x + size] for y, x in corners]


# Measured here on ``face()`` with the official LPIPS network under scipy's Gaussian filter; that network with these
# weights also gives .010 .084 .230 .381 .482 on another clip, as an independent measurement had found.
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        pytest.param(lpips_alex, (0.0188, 0.1873, 0.4113, 0.6461), marks=needs("lpips-alex"), id="lpips-alex"),
        pytest.param(lpips_vgg, (0.0205, 0.1467, 0.3167, 0.5047), marks=needs("lpips-vgg"), id="lpips-vgg"),
        pytest.param(dists, (0.0466, 0.1771, 0.285, 0.3987), marks=needs("dists"), id="dists"),
    ],
)
def test_known_values_under_blur(metric, expected):
    target = face()
    assert metric(target, target).item() == pytest.approx(0, abs=1e-6)
    found = [metric(blurred(target, sigma), target).item() for sigma in BLURS]
    assert found == pytest.approx(expected, rel=0.02)  # films decode slightly differently


@needs("lpips-alex")
def test_lpips_of_each_video_is_the_mean_over_its_frames(monkeypatch):
    target = torch.stack([real_clip("carphone_pristine", 3, 64, 64), real_clip("bikes", 3, 64, 64)])
    restored = noisy(target, 0.2).clamp(-1, 1)
    monkeypatch.setattr(frames, "PIXELS_AT_ONCE", 2 * 64 * 64)  # two frames, then one
    network = VideoLPIPS("alex")
    expected = [network(a[None], b[None]).item() for a, b in zip(restored, target)]
    assert lpips_alex(restored, target).tolist() == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def dists_by_its_definition(x, y):
    """Ding et al. 2020, Eqs. 2 to 6, on pictures [3, H, W] in [0, 1], written down from the paper in float64."""
    arrays = read_arrays(wheel_file(*VGG), LPIPS_FILES["vgg"][1])["VGG16_0"]
    weights = {k: v.double().flatten() for k, v in torch.load(wheel_file(*ALPHA_BETA), weights_only=True).items()}
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]  # ImageNet
    inputs = [p.double()[None] for p in (x, y)]
    maps, features = [inputs], [(p - mean) / deviation for p in inputs]
    hanning = torch.tensor([0.25, 0.5, 0.25]).double()  # 5 samples, without the zeros at the ends
    convolution = 0
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        if stage:
            window = torch.outer(hanning, hanning).expand(features[0].shape[1], 1, 3, 3)
            features = [
                F.conv2d(f.square(), window, stride=2, padding=1, groups=f.shape[1]).add(1e-12).sqrt() for f in features
            ]
        for _ in range(depth):
            entry = arrays[f"Conv_{convolution}"]
            kernel = torch.from_numpy(np.einsum("hwio->oihw", entry["kernel"]).astype(np.float64))
            bias = torch.from_numpy(entry["bias"].astype(np.float64))
            features = [F.conv2d(f, kernel, bias, padding=1).relu() for f in features]
            convolution += 1
        maps.append(features)
    luminance, structure = [], []
    for a, b in maps:
        a, b = a[0].flatten(1), b[0].flatten(1)
        ma, mb = a.mean(1), b.mean(1)
        covariance = ((a - ma[:, None]) * (b - mb[:, None])).mean(1)
        luminance.append((2 * ma * mb + 1e-6) / (ma**2 + mb**2 + 1e-6))
        structure.append((2 * covariance + 1e-6) / (a.var(1, correction=0) + b.var(1, correction=0) + 1e-6))
    similarity = (weights["alpha"] * torch.cat(luminance) + weights["beta"] * torch.cat(structure)).sum()
    return 1 - (similarity / (weights["alpha"].sum() + weights["beta"].sum())).item()


@needs("dists")
@pytest.mark.parametrize("image", ["astronaut", "camera"])
def test_dists_equals_its_definition(image):
    (target,) = crops(image, (100, 160), size=80)
    for restored in (blurred(target, 1), noisy(target, 0.2).clamp(-1, 1)):
        x, y = ((v[0, :, 0] + 1) / 2 for v in (restored, target))
        assert dists(restored, target).item() == pytest.approx(dists_by_its_definition(x, y), abs=1e-5)


@needs("dists", "lpips-vgg")
def test_dists_forgives_another_patch_of_the_same_texture_more_than_lpips_on_the_same_network_does():
    target, elsewhere = crops("grass", (0, 0), (200, 300), size=160)
    softened = blurred(target, 1.5)
    by_dists, by_lpips = (m(elsewhere, target).item() / m(softened, target).item() for m in (dists, lpips_vgg))
    assert by_dists < 1 < by_lpips  # measured 0.86 and 1.27


@needs("dists")
def test_dists_is_symmetric_and_a_loss_with_gradients_for_the_frames_alone():
    loss = VideoDISTS()
    target = real_clip("carphone_pristine", 2, 64, 64)[None]
    frames_ = blurred(target, 1).requires_grad_()
    value = loss(frames_, target)
    value.backward()
    assert value.item() == pytest.approx(loss(target, frames_.detach()).item(), rel=1e-5)
    assert frames_.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    step = 1e-2 * frames_.grad / frames_.grad.abs().max()
    assert loss((frames_ - step).detach(), target) < value


@needs("dists")
def test_dists_downloads_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("torchvision.models.vgg16", refuse)
    VideoDISTS()


@needs("dists")
def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(dists_file, "ALPHA_BETA_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"'weights.pt' has SHA-256 .*, expected 0000.*install dists-pytorch==0.1"):
        VideoDISTS()
