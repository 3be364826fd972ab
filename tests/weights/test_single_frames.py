"""Single frames as images: the shortcut is exact."""

import pytest
import torch

from tests.models import build
from weights import single_frames


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_single_frames_as_images_changes_nothing(name):
    vae = build(name)
    picture = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64)

    def gradient():
        leaf = picture.clone().requires_grad_()
        latents = vae.encode(leaf).latent_dist.mode()
        out = vae.decode(latents).sample
        return out, *torch.autograd.grad(out.square().sum(), leaf)

    expected = gradient()
    with single_frames.single_frames_as_images():
        got = gradient()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_single_frames_as_images_leaves_clips_and_upstream_alone(name):
    vae = build(name)
    clip = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    encode = lambda: vae.encode(clip).latent_dist.mode()  # noqa: E731
    expected = encode()
    before = [single_frames.WanCausalConv3d.forward, single_frames.CogVideoXCausalConv3d.forward]
    with single_frames.single_frames_as_images():
        assert before[0] is not single_frames.WanCausalConv3d.forward
        torch.testing.assert_close(encode(), expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(KeyboardInterrupt), single_frames.single_frames_as_images():
        raise KeyboardInterrupt
    assert before == [single_frames.WanCausalConv3d.forward, single_frames.CogVideoXCausalConv3d.forward]


@pytest.mark.parametrize("cached", [0, 2])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(
    "conv",
    [
        lambda: single_frames.WanCausalConv3d(4, 6, 3, padding=1),
        lambda: single_frames.WanCausalConv3d(4, 6, 1),
        lambda: single_frames.WanCausalConv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)),
        lambda: single_frames.CogVideoXCausalConv3d(4, 6, 3),
        lambda: single_frames.CogVideoXCausalConv3d(4, 6, 1),
    ],
)
def test_every_convolution_gives_the_same_output_and_cache(conv, frames, cached):
    torch.manual_seed(0)
    conv = conv().double().requires_grad_(False)
    x = torch.randn(2, 4, frames, 6, 6, dtype=torch.float64)
    cache = torch.randn(2, 4, cached, 6, 6, dtype=torch.float64) if cached else None
    expected = conv(x, cache)
    with single_frames.single_frames_as_images():
        got = conv(x, cache)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
