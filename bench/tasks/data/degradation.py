"""The degradation pipeline of real-world super-resolution: blur, resize, noise, compression, twice over.

The second-order pipeline of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833) in the form for video of RealBasicVSR
(Chan et al. 2022, arXiv 2111.12704), which adds video codecs. Kernels, factors and qualities are drawn once for a clip,
noise for each frame. Departures, all for clips that are small: widths of kernels and strengths of noise are those of
the field for 256 pixels, and in proportion less for a smaller picture (which shows as much of the world with fewer
pixels); no picture on the way is smaller than the low-resolution one; codecs are driven by quantiser and not by bit
rate; the settings do not drift within a clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.tasks.data.compression import QUANTISERS, compress_frames, compress_video
from bench.tasks.task import pick, uniform

KERNELS = ("gaussian", "generalised", "plateau", "sinc")
KERNEL_WEIGHTS = (0.63, 0.135, 0.135, 0.1)
MODES = ("bilinear", "area", "bicubic")
REFERENCE = 256  # pixels; the crop that the published ranges are used with


@dataclass(frozen=True)
class Order:
    """Ranges of one of the two rounds.

    Attributes:
        blur_probability: how often the round blurs at all.
        sigma: widths of the kernel, pixels of a picture with ``REFERENCE`` pixels on the shorter side.
        up, down: probabilities that the picture is enlarged or shrunk; else it keeps its size.
        scale: factors of size, smallest and largest.
        noise: standard deviation of Gaussian noise in steps of 1/255.
        poisson: scale of Poisson noise.
        quality: JPEG quality.
    """

    blur_probability: float
    sigma: tuple[float, float]
    up: float
    down: float
    scale: tuple[float, float]
    noise: tuple[float, float]
    poisson: tuple[float, float]
    quality: tuple[int, int] = (30, 95)


FIRST = Order(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = Order(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))


def degrade(video: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """[3, frames, H, W] in [-1, 1] -> [3, frames, H, W]: degraded, ``scale`` times smaller, and enlarged again.

    The last enlargement (bicubic) gives model and VAE a picture of the size of the target, as DOVE does.
    """
    height, width = video.shape[2:]
    small = max(1, height // scale), max(1, width // scale)
    relative = min(1.0, min(height, width) / REFERENCE)
    x = _round(video, FIRST, small, relative, generator)
    x = _codec(x, generator)
    x = _round(x, SECOND, small, relative, generator)
    mode = MODES[pick(generator, len(MODES))]
    smooth = uniform(generator, 0, 1) < 0.8
    cutoff = uniform(generator, math.pi / 3, math.pi)

    def shrink(x: Tensor) -> Tensor:
        x = _resize(x, small, mode)
        return _filter(x, sinc_kernel(cutoff, _reach(small))) if smooth else x

    codec_last = uniform(generator, 0, 1) < 0.5
    x = _codec(shrink(x), generator) if codec_last else shrink(_codec(x, generator))
    return _resize(x.clamp(-1, 1), (height, width), "bicubic").clamp(-1, 1)


def _round(x: Tensor, order: Order, small: tuple[int, int], relative: float, generator: torch.Generator) -> Tensor:
    if uniform(generator, 0, 1) < order.blur_probability:
        x = _filter(
            x, random_kernel(generator, (order.sigma[0], max(0.3, order.sigma[1] * relative)), _reach(x.shape[2:]))
        )
    draw = uniform(generator, 0, 1)
    factor = 1.0
    if draw < order.up:
        factor = uniform(generator, 1.0, order.scale[1])
    elif draw < order.up + order.down:
        factor = uniform(generator, order.scale[0], 1.0)
    size = [max(s, round(n * factor)) for s, n in zip(small, x.shape[2:])]
    x = _resize(x, (size[0], size[1]), MODES[pick(generator, len(MODES))])
    x = _noise(x, order, relative, generator)
    return compress_frames(x, round(uniform(generator, *order.quality)))


def _noise(x: Tensor, order: Order, relative: float, generator: torch.Generator) -> Tensor:
    grey = uniform(generator, 0, 1) < 0.4
    if uniform(generator, 0, 1) < 0.5:
        shape = (1, *x.shape[1:]) if grey else x.shape
        sigma = relative * uniform(generator, *order.noise) / 255
        noise = 2 * sigma * torch.randn(shape, generator=generator)  # [-1, 1] is two units wide
    else:
        light = ((x.mean(0, keepdim=True) if grey else x).clamp(-1, 1) + 1) / 2
        noise = torch.poisson(light * 255, generator=generator) / 255 - light
        noise = 2 * relative * uniform(generator, *order.poisson) * noise
    return (x + noise).clamp(-1, 1)


def _codec(x: Tensor, generator: torch.Generator) -> Tensor:
    codec = tuple(QUANTISERS)[pick(generator, len(QUANTISERS))]
    return compress_video(x, codec, round(uniform(generator, *QUANTISERS[codec])))


def random_kernel(generator: torch.Generator, sigma: tuple[float, float], reach: int) -> Tensor:
    """A kernel [2 reach + 1, 2 reach + 1] of Real-ESRGAN's families, with sum 1; two out of three are isotropic."""
    family = KERNELS[int(torch.multinomial(torch.tensor(KERNEL_WEIGHTS), 1, generator=generator))]
    if family == "sinc":
        return sinc_kernel(uniform(generator, math.pi / 3, math.pi), reach)
    wide = uniform(generator, *sigma)
    narrow = wide if uniform(generator, 0, 1) < 2 / 3 else uniform(generator, *sigma)
    angle = uniform(generator, -math.pi, math.pi)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = (along / wide) ** 2 + (across / narrow) ** 2
    if family == "gaussian":
        kernel = torch.exp(-distance / 2)
    elif family == "generalised":
        kernel = torch.exp(-(distance ** uniform(generator, 0.5, 4)) / 2)
    else:
        kernel = 1 / (1 + distance ** uniform(generator, 1, 2))
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float, reach: int) -> Tensor:
    """The ideal low-pass filter, cut off at the window: rings at edges as over-sharpened video does."""
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius.clamp(min=1e-9))
    kernel[reach, reach] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def _reach(size: torch.Size | tuple[int, ...]) -> int:
    return min(10, (min(size) - 1) // 2)


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    reach = kernel.shape[0] // 2
    padded = F.pad(x.transpose(0, 1), (reach,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, *kernel.shape), groups=3).transpose(0, 1)


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    frames = x.transpose(0, 1)
    if mode == "area":
        return F.interpolate(frames, size=size, mode="area").transpose(0, 1)
    # Without antialiasing, as in the pipeline of the field: aliasing is one of the degradations.
    return F.interpolate(frames, size=size, mode=mode, align_corners=False).transpose(0, 1)
