"""Super-resolution and inpainting: the degradation is real, the masks have the areas that they should."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from bench.tasks import TASKS
from bench.tasks.data.compression import compress_frames, compress_video
from bench.tasks.data.degradation import degrade, random_kernel, sinc_kernel
from bench.tasks.inpainting import HIDDEN, centre_mask, object_mask
from suite.motion import moving_clip


def psnr(a, b):
    return peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=2)


def clip(seed, frames=9, size=64):
    return moving_clip(torch.Generator().manual_seed(seed), frames, size, size)


def test_super_resolution_degrades_within_a_window():
    values = [
        psnr(pair.target, pair.condition) for pair in (TASKS["super-resolution"].clip(s, 9, 64, 64) for s in range(12))
    ]
    assert min(values) > 12 and max(values) < 32
    assert 18 < sum(values) / len(values) < 26
    assert max(values) - min(values) > 2  # not all alike


def test_a_larger_scale_degrades_more():
    at = {}
    for scale in (1, 8):
        at[scale] = [psnr(clip(s), degrade(clip(s), scale, torch.Generator().manual_seed(s))) for s in range(6)]
    assert sum(at[1]) / 6 > sum(at[8]) / 6 + 3


def test_fine_detail_is_lost():
    """Differences between neighbours, which a picture enlarged four times hardly has."""

    def detail(video):
        return sum((video.diff(n=2, dim=d)).square().mean() for d in (2, 3))

    ratios = []
    for seed in range(8):
        pair = TASKS["super-resolution"].clip(seed, 5, 64, 64)
        ratios.append((detail(pair.condition) / detail(pair.target)).item())
    assert max(ratios) < 0.25, ratios


@pytest.mark.parametrize(("codec", "good", "bad"), [("libx264", 18, 40), ("mpeg4", 2, 20)])
@pytest.mark.parametrize("size", [(16, 16), (33, 47), (64, 64)])
def test_codecs_keep_frames_and_lose_detail(codec, good, bad, size):
    video = moving_clip(torch.Generator().manual_seed(1), 9, *size)
    fine, coarse = compress_video(video, codec, good), compress_video(video, codec, bad)
    assert fine.shape == coarse.shape == video.shape
    assert psnr(video, fine) > 25 and psnr(video, fine) > psnr(video, coarse) + 3
    # Each frame is that frame, not its neighbour.
    errors = (fine[:, :, None] - video[:, None, :]).square().mean((0, 3, 4))
    assert errors.argmin(1).tolist() == list(range(9))
    assert torch.equal(fine, compress_video(video, codec, good))


def test_jpeg_and_an_unknown_codec():
    video = clip(2)
    assert psnr(video, compress_frames(video, 95)) > psnr(video, compress_frames(video, 20)) + 3
    with pytest.raises(ValueError, match=r"Unknown codec 'gif': pass one of libx264, mpeg4"):
        compress_video(video, "gif", 3)


def test_kernels_have_unit_sum_and_widths():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        kernel = random_kernel(generator, (0.3, 2.0), 7)
        assert kernel.shape == (15, 15) and kernel.sum().item() == pytest.approx(1, abs=1e-5)
        assert kernel[7, 7] > 0.01
    sinc = sinc_kernel(1.2, 10)
    assert sinc.min() < 0  # it rings
    response = torch.fft.fft2(sinc).abs()[0]
    assert response[1] > 0.9 and response[8] < 0.1  # passes 1/21, stops 8/21 cycles a pixel; the cutoff is at 4/21


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (17, 31)])
def test_the_central_mask_is_half_of_height_and_width(size):
    mask = centre_mask(3, *size)
    assert mask.sum() == 3 * (size[0] // 2) * (size[1] // 2)
    rows = mask[0, 0].amax(1).nonzero()[:, 0]
    assert abs(rows.float().mean() - (size[0] - 1) / 2) <= 1  # in the middle


def test_object_masks_move_and_stay_moderate():
    for seed in range(20):
        mask = object_mask(torch.Generator().manual_seed(seed), 17, 48, 64)
        area = mask.mean((0, 2, 3))
        assert area.min() > 0.02 and area.max() < 0.5
        overlap = (mask[0, 0] * mask[0, -1]).sum() / torch.maximum(mask[0, 0], mask[0, -1]).sum()
        assert overlap < 0.85
        steps = (mask[0, 1:] - mask[0, :-1]).abs().sum((1, 2)) / mask[0, 1:].sum((1, 2))
        assert steps.max() < 0.6  # smoothly


def test_inpainting_hides_what_the_mask_covers():
    pair = TASKS["inpainting"].clip(0, 3, 32, 32)
    assert pair.mask.mean() == 0.25
    hidden = pair.mask.expand_as(pair.target) > 0
    assert (pair.condition[hidden] == HIDDEN).all()
