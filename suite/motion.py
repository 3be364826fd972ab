"""A seeded generator of clips with known motion: a camera over photographs, and objects that pass in front.

Photographs have the statistics of natural images, which a decoder learns far faster than drawn textures; the motion
(pan, zoom, rotation) is exact, and the objects give occlusion and disocclusion.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/camera.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@lru_cache
def photographs() -> tuple[Tensor, ...]:
    """The photographs of the scikit-image and scikit-learn wheels, each float32 [3, H, W] in [-1, 1]."""
    images = []
    for package, name in PHOTOGRAPHS:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"The clip generator needs the photographs of the package {package}: install it.")
        path = Path(spec.submodule_search_locations[0]) / name
        if path.exists():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1)
    return tuple(images)


def moving_clip(
    generator: torch.Generator,
    frames: int,
    height: int,
    width: int,
    objects: int = 1,
    photos: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """[3, frames, height, width] in [-1, 1]: a camera over one photograph, with objects cut from others.

    Args:
        photos: each [3, H, W] in [-1, 1] (default: ``photographs()``).
    """
    photos = photographs() if photos is None else photos
    clip = _camera(generator, _pick(generator, photos), frames, height, width)
    for _ in range(objects):
        texture = _camera(generator, _pick(generator, photos), frames, height, width)
        mask = _moving_ellipse(generator, frames, height, width)
        clip = mask * texture + (1 - mask) * clip
    return clip.clamp(-1, 1)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _pick(generator: torch.Generator, images: tuple[Tensor, ...]) -> Tensor:
    return images[torch.randint(len(images), (), generator=generator)]


def _camera(generator: torch.Generator, photo: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Sample the photograph along a smooth path of position, zoom and angle (all linear in time)."""
    fits = min(photo.shape[1] / height, photo.shape[2] / width)
    # Photo pixels per output pixel; shrink first, so that bilinear sampling below does not alias.
    shrink = _uniform(generator, 1.0, max(1.0, fits / 1.5))
    size = [max(height, round(photo.shape[1] / shrink)), max(width, round(photo.shape[2] / shrink))]
    photo = F.interpolate(photo[None], size=size, mode="bilinear", antialias=True)
    ph, pw = photo.shape[-2:]
    t = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    speed = frames / 8
    zoom = _uniform(generator, 0.7, 1.1) * torch.exp(t * _uniform(generator, -0.2, 0.2) * speed).clamp(0.5, 1.5)
    angle = _uniform(generator, -0.3, 0.3) + t * _uniform(generator, -0.2, 0.2) * speed
    margin_y, margin_x = max(0.0, (ph - height) / 2), max(0.0, (pw - width) / 2)
    y = _uniform(generator, -margin_y, margin_y) + t * _uniform(generator, -12, 12) * speed
    x = _uniform(generator, -margin_x, margin_x) + t * _uniform(generator, -12, 12) * speed
    theta = torch.zeros(frames, 2, 3)
    theta[:, 0, 0] = zoom * angle.cos() * width / pw
    theta[:, 0, 1] = -zoom * angle.sin() * height / pw
    theta[:, 1, 0] = zoom * angle.sin() * width / ph
    theta[:, 1, 1] = zoom * angle.cos() * height / ph
    theta[:, 0, 2], theta[:, 1, 2] = 2 * x / pw, 2 * y / ph
    grid = F.affine_grid(theta, [frames, 3, height, width], align_corners=False)
    sampled = F.grid_sample(
        photo.expand(frames, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return sampled.transpose(0, 1)


def _moving_ellipse(generator: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """Soft-edged mask [1, frames, height, width] of an ellipse that crosses the picture."""
    t = torch.linspace(-0.5, 0.5, frames)[:, None, None] if frames > 1 else torch.zeros(1, 1, 1)
    cy = _uniform(generator, 0.2, 0.8) + t * _uniform(generator, -0.6, 0.6)
    cx = _uniform(generator, 0.2, 0.8) + t * _uniform(generator, -0.6, 0.6)
    ry, rx = _uniform(generator, 0.1, 0.3), _uniform(generator, 0.1, 0.3)
    ys = (torch.arange(height) + 0.5)[None, :, None] / height
    xs = (torch.arange(width) + 0.5)[None, None, :] / width
    inside = 1 - (((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2).sqrt()
    return (inside * min(ry * height, rx * width)).clamp(0, 1)[None]
