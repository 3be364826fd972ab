"""Exact pictures of simple scenes: ray casting of boxes and ellipsoids with photographs on them.

Each shape is the cube [-1, 1]^3 or the unit ball under a scaling, a rotation about the vertical axis and a shift. World
axes: x to the right, y up, z ahead; lengths in metres.
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
        metres: side of the photograph on the surface; it lies in the middle of a face and is mirrored beyond its edges.
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
        self.centre = torch.tensor([s.centre for s in shapes], dtype=torch.float32)
        self.half = torch.tensor([s.half for s in shapes], dtype=torch.float32)
        yaw = torch.tensor([s.yaw for s in shapes], dtype=torch.float32)
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        turn = torch.stack([yaw.cos(), zero, -yaw.sin(), zero, one, zero, yaw.sin(), zero, yaw.cos()], 1)
        self.to_local = turn.view(-1, 3, 3) / self.half[:, :, None]
        self.colour = torch.tensor([s.colour for s in shapes], dtype=torch.float32)
        self.texture = torch.tensor([s.texture for s in shapes])
        self.metres = torch.tensor([s.metres for s in shapes], dtype=torch.float32)
        self.owner = torch.tensor([s.owner for s in shapes])
        self.reach = torch.where(torch.tensor([s.round for s in shapes]), self.half.amax(1), self.half.norm(dim=1))


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
        ahead = F.normalize(torch.tensor(self.target, dtype=torch.float32) - torch.tensor(self.position), dim=0)
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
    """First hits of rays [r, 3] of length 1 that start at one point [3]. Memory: about 5 r m bytes for m shapes."""
    offset = scene.centre - origin
    # A ray that keeps further from a shape's bounding ball than its radius misses it; most do.
    nearest = (offset.square().sum(1) - scene.reach**2).clamp(min=0).sqrt()
    inside = offset.norm(dim=1) <= scene.reach
    ray, shape = ((rays @ offset.T >= nearest * (1 - 1e-5)) | inside).nonzero(as_tuple=True)
    distances = _distances(scene, shape, origin.expand(len(ray), 3), rays[ray])
    distance = torch.full((len(rays),), torch.inf).scatter_reduce(0, ray, distances, "amin")
    first = (distances == distance[ray]) & distances.isfinite()
    chosen = torch.full((len(rays),), len(scene.centre)).scatter_reduce(0, ray[first], shape[first], "amin")
    chosen = torch.where(distance.isfinite(), chosen, 0)
    distance = distance.clamp(max=FAR)
    position = origin + distance[:, None] * rays
    local = torch.einsum("rij,rj->ri", scene.to_local[chosen], position - scene.centre[chosen])
    face = F.one_hot(local.abs().argmax(1), 3) * local.sign()
    outward = torch.where((chosen >= scene.boxes)[:, None], local, face)
    normal = F.normalize(torch.einsum("rij,ri->rj", scene.to_local[chosen], outward), dim=1)
    return Hits(distance, chosen, position, normal, local)


def blocked(scene: Scene, hits: Hits, direction: Tensor) -> tuple[Tensor, Tensor]:
    """[r] each: whether a shape of the scene (owner 0), and whether one of another owner, stands between a hit and the
    light in ``direction`` [3].
    """
    facing = (hits.found & (hits.normal @ direction > 0)).nonzero()[:, 0]
    start = hits.position[facing] + 1e-3 * hits.normal[facing]
    offset = scene.centre - start.mean(0) if len(start) else scene.centre  # near zero, for the sake of rounding
    start_offset = start - start.mean(0) if len(start) else start
    across = torch.linalg.svd(direction[None])[2][1:].T  # [3, 2]: the plane that the light falls on
    ray, shape = (torch.cdist(start_offset @ across, offset @ across) < scene.reach + 1e-3).nonzero(as_tuple=True)
    hit = _distances(scene, shape, start[ray], direction.expand(len(ray), 3)).isfinite()
    results = []
    for blocker in (scene.owner == 0, scene.owner > 0):
        result = torch.zeros_like(hits.found)
        result[facing[ray[hit & blocker[shape]]]] = True
        results.append(result)
    return results[0], results[1]


def _distances(scene: Scene, shape: Tensor, origin: Tensor, rays: Tensor) -> Tensor:
    """[k] from ray k to shape k: ``inf`` where it misses the shape or starts inside it."""
    to_local = scene.to_local[shape]
    d = torch.einsum("kij,kj->ki", to_local, rays)
    o = torch.einsum("kij,kj->ki", to_local, origin - scene.centre[shape])
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    one, other = (-1 - o) * inverse, (1 - o) * inverse
    enter, leave = torch.minimum(one, other).amax(1), torch.maximum(one, other).amin(1)
    boxes = torch.where(enter < leave, enter, torch.inf)
    a, b, c = (d * d).sum(1), (d * o).sum(1), (o * o).sum(1) - 1
    root = b * b - a * c
    balls = torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / a, torch.inf)
    enter = torch.where(shape < scene.boxes, boxes, balls)
    return torch.where(enter > 1e-4, enter, torch.inf)


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
    colour[textured] *= sample(scene.texture[index], 0.5 + u / metres, 0.5 - v / metres, level)
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
