"""A procedural room with photographs on its walls and things in it, and a camera that swings through it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.tasks.scenes.raycast import (
    Camera,
    Scene,
    Shape,
    albedo,
    blocked,
    cast,
    mean_of_subpixels,
    textures,
    to_pixels,
)
from bench.tasks.task import pick, uniform

HALF, HEIGHT = 3.0, 3.0  # the room: 6 m wide and deep, 3 m high
SUBPIXELS = 3
LAMP = (-0.35, 0.85, -0.4)
STEP = 0.11  # radians of the camera's swing a frame


@dataclass(frozen=True)
class Room:
    """What stands in it, and the swing: sideways, up and down, to and fro, out of step with each other."""

    scene: Scene
    swing: float
    rise: float
    phases: tuple[float, float, float]

    @staticmethod
    def random(generator: torch.Generator) -> Room:
        # Short clips begin before the middle of the swing, where it is fast; half of them go the other way.
        first = uniform(generator, -1.1, -0.3)
        phases = first, uniform(generator, -math.pi, math.pi), uniform(generator, -math.pi, math.pi)
        swing = uniform(generator, 1.5, 2.1) * (1 if pick(generator, 2) else -1)
        return Room(Scene(_furnished(generator)), swing, uniform(generator, 0.2, 0.4), phases)

    def camera(self, frame: int) -> Camera:
        """The camera of a frame; it stays in the room for any number of frames."""
        side, up, near = (math.sin(STEP * frame * pace + p) for pace, p in zip((1.0, 0.7, 0.4), self.phases))
        return Camera(
            (self.swing * side, 1.5 + self.rise * up, -2.3 + 0.4 * near), (0.25 * self.swing * side, 1.0, 1.2), 58.0
        )

    def frame(self, frame: int, height: int, width: int) -> Tensor:
        """[3, height, width] in [-1, 1], exact up to the sampling of ``SUBPIXELS`` squared rays a pixel."""
        camera = self.camera(frame)
        parts = []
        towards = F.normalize(torch.tensor(LAMP), dim=0)
        for rays in camera.rays(SUBPIXELS * height, SUBPIXELS * width).split(1 << 15):
            hits = cast(self.scene, torch.tensor(camera.position), rays)
            surface = albedo(self.scene, hits, rays, 1 / camera.focal(SUBPIXELS * height))
            shaded = torch.logical_or(*blocked(self.scene, hits, towards))
            direct = (hits.normal @ towards).clamp(min=0) * ~shaded
            parts.append(surface * (0.55 + 0.75 * direct + 0.15 * hits.normal[:, 1])[:, None])
        return to_pixels(mean_of_subpixels(torch.cat(parts), height, width, SUBPIXELS))

    def depth(self, frame: int, height: int, width: int) -> Tensor:
        """[height, width]: distance along the ray through each pixel's centre, metres."""
        camera = self.camera(frame)
        hits = cast(self.scene, torch.tensor(camera.position), camera.rays(height, width))
        return hits.distance.view(height, width)


def _furnished(generator: torch.Generator) -> list[Shape]:
    count = len(textures()[0])

    def photo() -> int:
        return pick(generator, count)

    walls = [
        Shape((0, -0.5, 0), (HALF + 1, 0.5, HALF + 1), texture=photo(), metres=uniform(generator, 3, 5)),
        Shape((0, HEIGHT / 2, HALF + 0.5), (HALF + 1, HEIGHT, 0.5), texture=photo(), metres=uniform(generator, 3.5, 5)),
        Shape((-HALF - 0.5, HEIGHT / 2, 0), (0.5, HEIGHT, HALF), texture=photo(), metres=uniform(generator, 3.5, 5)),
        Shape((HALF + 0.5, HEIGHT / 2, 0), (0.5, HEIGHT, HALF), texture=photo(), metres=uniform(generator, 3.5, 5)),
        Shape((0, HEIGHT + 0.5, 0), (HALF, 0.5, HALF), (0.75, 0.75, 0.72), owner=1),
        Shape((0, HEIGHT / 2, -HALF - 0.5), (HALF, HEIGHT, 0.5), (0.5, 0.5, 0.5)),
    ]
    things = []
    for k in range(5):
        x, z = -1.8 + 0.9 * k + uniform(generator, -0.3, 0.3), uniform(generator, -0.4, 2.3)
        size, ball = uniform(generator, 0.25, 0.5), bool(pick(generator, 2))
        high = size if ball else uniform(generator, 0.3, 0.9)
        tint = tuple(uniform(generator, 0.6, 1.3) for _ in range(3))
        things.append(
            Shape(
                (x, high, z), (size, high, size), tint, uniform(generator, -0.8, 0.8), photo(),  # type: ignore[arg-type]
                uniform(generator, 0.9, 1.5), ball,
            )
        )  # fmt: skip
    return walls + things
