"""A decoder of the structure of TAEHV (github.com/madebyollin/taehv), for tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Squash(nn.Module):
    def forward(self, x):
        return 3 * (x / 3).tanh()


class WithMemory(nn.Module):
    """Sees the frame before, which is zero for the first."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip
        self.skip, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x, past):
        return self.act(self.conv(torch.cat([x, past], dim=1)) + self.skip(x))


class Grow(nn.Module):
    """Several frames out of each."""

    def __init__(self, channels, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x):
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyVideoVAE(nn.Module):
    """Only what decodes."""

    def __init__(self, latent_channels=4, width=6, grows=(2, 2), patch_size=1, is_cogvideox=False):
        super().__init__()
        self.patch_size, self.is_cogvideox = patch_size, is_cogvideox
        layers = [Squash(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for stride in grows:
            layers += [WithMemory(width), nn.Upsample(scale_factor=2), Grow(width, stride)]
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers += [nn.ReLU(inplace=True), nn.Conv2d(width, 3 * patch_size**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)
        self.frames_to_trim = torch.Size(grows).numel() - 1

    def decode_video(self, x, parallel=True, show_progress_bar=True):
        """[batch, time, channels, h, w] -> the same of frames, all at once."""
        batch, count = x.shape[:2]
        x = x.flatten(0, 1)
        for layer in self.decoder:
            if isinstance(layer, WithMemory):
                frames = x.unflatten(0, (batch, -1))
                past = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
                x = layer(x, past.flatten(0, 1))
            else:
                x = layer(x)
        frames = F.pixel_shuffle(x, self.patch_size).clamp(0, 1).unflatten(0, (batch, -1))
        return frames if self.is_cogvideox and count % 2 == 0 else frames[:, self.frames_to_trim :]
