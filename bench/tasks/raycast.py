"""Exact pictures of simple scenes: ray casting of boxes and ellipsoids with photographs on them.

Each shape is the cube [-1, 1]^3 or the unit ball under a rotation about the vertical axis, a scaling and a shift, so one
formula intersects them all. World axes: x to the right, y up, z ahead; lengths in metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from suite.motion import photographs

TEXELS = 256
FAR = 1e6
PLAIN = -1


@dataclass(frozen=True)
class Shape:
    """A box, or with ``round`` an ellipsoid.

    Attributes:
        centre, half: position and half the extent along its own axes, metres.
        yaw: rotation about the vertical axis, radians.
        colour: factor of the texture, or the colour itself; linear light.
        texture: index in ``textures()``, or ``PLAIN``.
        metres: side of the photograph on the surface.
        owner: a number of the caller's: 0 for the scene, else which object the shape is a part of.
    """

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    yaw: float = 0.0
    texture: int = PLAIN
    metres: float = 2.0
    round: bool = False
    owner: int = 0


class Scene:
    """Shapes as tensors: ``to_local`` [m, 3, 3], ``centre``, ``half``, ``colour`` [m, 3], and one number each."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        shapes = sorted(shapes, key=lambda s: s.round)  # boxes first, so that each kind is one slice
        self.boxes = sum(not s.round for s in shapes)
        self.centre = torch.tensor([s.centre for s in shapes])
        self.half = torch.tensor([s.half for s in shapes])
        yaw = torch.tensor([s.yaw for s in shapes])
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        turn = torch.stack([yaw.cos(), zero, -yaw.sin(), zero, one, zero, yaw.sin(), zero, yaw.cos()], 1)
        self.to_local = turn.view(-1, 3, 3) / self.half[:, :, None]
        self.colour = torch.tensor([s.colour for s in shapes])
        self.texture = torch.tensor([s.texture for s in shapes])
        self.metres = torch.tensor([s.metres for s in shapes])
        self.owner = torch.tensor([s.owner for s in shapes])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: where it stands.
        target: what it looks at.
        view_degrees: the vertical angle of view.
    """

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    view_degrees: float = 50.0

    def axes(self) -> Tensor:
        """[3, 3]: rows right, down, ahead."""
        ahead = F.normalize(torch.tensor(self.target) - torch.tensor(self.position), dim=0)
        right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), ahead), dim=0)
        return torch.stack([right, torch.linalg.cross(ahead, right) * -1, ahead])

    def focal(self, height: int) -> float:
        """Focal length in pixels."""
        return height / (2 * math.tan(math.radians(self.view_degrees) / 2))

    def rays(self, height: int, width: int) -> Tensor:
        """Directions [height * width, 3] of length 1 through the pixels' centres."""
        ys = torch.arange(height) + 0.5 - height / 2
        xs = torch.arange(width) + 0.5 - width / 2
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        local = torch.stack([x, y, torch.full_like(x, self.focal(height))], -1).view(-1, 3)
        return F.normalize(local @ self.axes(), dim=1)


@dataclass(frozen=True)
class Hits:
    """Where rays end: ``distance`` [r] (``FAR`` where nothing is hit), ``shape`` [r], ``position``, ``normal`` [r, 3],
    and ``local`` [r, 3], the place on the cube or ball.
    """

    distance: Tensor
    shape: Tensor
    position: Tensor
    normal: Tensor
    local: Tensor

    @property
    def found(self) -> Tensor:
        return self.distance < FAR


def cast(scene: Scene, origin: Tensor, rays: Tensor) -> Hits:
    """First hits of rays [r, 3] from one origin [3] or from [r, 3]. Memory: about 40 r m bytes for m shapes."""
    origin = origin.expand_as(rays)
    distance, shape = _distances(scene, origin, rays).min(dim=1)
    position = origin + distance.clamp(max=FAR)[:, None] * rays
    local = torch.einsum("rij,rj->ri", scene.to_local[shape], position - scene.centre[shape])
    face = F.one_hot(local.abs().argmax(1), 3) * local.sign()
    inward = torch.where((shape >= scene.boxes)[:, None], local, face.to(local))
    normal = F.normalize(torch.einsum("rij,ri->rj", scene.to_local[shape], inward), dim=1)
    return Hits(distance.clamp(max=FAR), shape, position, normal, local)


def blocked(scene: Scene, hits: Hits, direction: Tensor, blockers: Tensor) -> Tensor:
    """[r]: whether one of the shapes in ``blockers`` [m] (booleans) stands between a hit and the light."""
    result = torch.zeros_like(hits.found)
    facing = hits.found & (hits.normal @ direction > 0)
    start = hits.position[facing] + 1e-3 * hits.normal[facing]
    distances = _distances(scene, start, direction.expand_as(start))
    result[facing] = ((distances < FAR) & blockers).any(1)
    return result


def _distances(scene: Scene, origin: Tensor, rays: Tensor) -> Tensor:
    """[r, m], ``inf`` where a ray misses a shape or starts inside it."""
    local_rays = torch.einsum("mij,rj->rmi", scene.to_local, rays)
    local_origin = torch.einsum("mij,rj->rmi", scene.to_local, origin) - torch.einsum(
        "mij,mj->mi", scene.to_local, scene.centre
    )
    inverse = 1 / torch.where(local_rays[:, : scene.boxes].abs() < 1e-9, 1e-9, local_rays[:, : scene.boxes])
    one, other = (-1 - local_origin[:, : scene.boxes]) * inverse, (1 - local_origin[:, : scene.boxes]) * inverse
    enter, leave = torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)
    boxes = torch.where((enter < leave) & (enter > 1e-4), enter, torch.inf)
    d, o = local_rays[:, scene.boxes :], local_origin[:, scene.boxes :]
    a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum(-1) - 1
    root = b * b - a * c
    enter = (-b - root.clamp(min=0).sqrt()) / a
    balls = torch.where((root > 0) & (enter > 1e-4), enter, torch.inf)
    return torch.cat([boxes, balls], dim=1)


def albedo(scene: Scene, hits: Hits, rays: Tensor, pixel_angle: float) -> Tensor:
    """Surface colour [r, 3] in linear light; photographs are filtered to the width of a pixel on the surface."""
    colour = scene.colour[hits.shape].clone()
    textured = hits.found & (scene.texture[hits.shape] != PLAIN)
    index, local = hits.shape[textured], hits.local[textured]
    metric = local * scene.half[index]
    axis = torch.where(index < scene.boxes, local.abs().argmax(1), 3)
    around = torch.atan2(local[:, 0], local[:, 2]) * scene.half[index].amax(1)
    u = torch.stack([metric[:, 2], metric[:, 0], metric[:, 0], around], 1).gather(1, axis[:, None])[:, 0]
    v = torch.stack([metric[:, 1], metric[:, 2], metric[:, 1], metric[:, 1]], 1).gather(1, axis[:, None])[:, 0]
    metres = scene.metres[index]
    slant = (hits.normal[textured] * rays[textured]).sum(1).abs().clamp(min=0.15)
    footprint = hits.distance[textured] * pixel_angle / slant * TEXELS / metres
    level = footprint.clamp(min=1).log2().clamp(max=len(textures()) - 1)
    colour[textured] *= sample(scene.texture[index], u / metres, -v / metres, level)
    return colour


def sample(texture: Tensor, u: Tensor, v: Tensor, level: Tensor) -> Tensor:
    """Photographs [r, 3] at (u, v) in photographs, mirrored beyond 1; trilinear in a pyramid (``level`` in octaves)."""
    result = torch.zeros(len(u), 3)
    for k, pyramid in enumerate(textures()):
        weight = (1 - (level - k).abs()).clamp(min=0)
        rows = weight > 0
        if rows.any():
            result[rows] += weight[rows, None] * _bilinear(pyramid, texture[rows], u[rows], v[rows])
    return result


def _bilinear(pyramid: Tensor, texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    size = pyramid.shape[1]

    def place(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (1 - ((x % 2) - 1).abs()) * size - 0.5  # mirrored
        low = x.floor()
        return low.long().clamp(0, size - 1), (low.long() + 1).clamp(0, size - 1), (x - low)[:, None]

    (x0, x1, fx), (y0, y1, fy) = place(u), place(v)
    top = pyramid[texture, y0, x0] * (1 - fx) + pyramid[texture, y0, x1] * fx
    bottom = pyramid[texture, y1, x0] * (1 - fx) + pyramid[texture, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


@lru_cache
def textures() -> tuple[Tensor, ...]:
    """Pyramid of the photographs in linear light: [n, s, s, 3] for s = 256, 128, ..., 1."""
    squares = []
    for photo in photographs():
        side = min(photo.shape[1:])
        top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
        square = photo[None, :, top : top + side, left : left + side]
        squares.append(F.interpolate(square, size=(TEXELS, TEXELS), mode="bilinear", antialias=True))
    level = to_linear(torch.cat(squares))
    levels = [level]
    while level.shape[-1] > 1:
        level = F.avg_pool2d(level, 2)
        levels.append(level)
    return tuple(x.permute(0, 2, 3, 1).contiguous() for x in levels)


def to_linear(pixels: Tensor) -> Tensor:
    """[-1, 1] -> linear light in [0, 1]."""
    return ((pixels.clamp(-1, 1) + 1) / 2) ** 2.2


def to_pixels(light: Tensor) -> Tensor:
    """Linear light -> [-1, 1]."""
    return light.clamp(0, 1) ** (1 / 2.2) * 2 - 1


def mean_of_subpixels(values: Tensor, height: int, width: int, samples: int) -> Tensor:
    """[height * samples * width * samples, c] -> [c, height, width]."""
    grid = values.view(height, samples, width, samples, -1)
    return grid.mean((1, 3)).permute(2, 0, 1)
