"""A procedural road: lanes, verges, houses, trees, and cars under one sun."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.tasks.scenes.raycast import (
    Camera,
    Hits,
    Scene,
    Shape,
    albedo,
    blocked,
    cast,
    mean_of_subpixels,
    sample,
    to_pixels,
)
from bench.tasks.task import pick, uniform

BRICK, GRASS, GRAVEL = 5, 6, 7  # indices of suite.motion.PHOTOGRAPHS
LANE = 3.5
HALF_ROAD = 2 * LANE
SUBPIXELS = 2
SECONDS_PER_FRAME = 0.1  # driving data sets are recorded at 10 Hz
PAINTS = (
    (0.55, 0.03, 0.03), (0.04, 0.10, 0.40), (0.75, 0.75, 0.75),
    (0.06, 0.06, 0.07), (0.70, 0.50, 0.05), (0.05, 0.28, 0.12),
)  # fmt: skip  # red, blue, white, black, yellow, green
GLASS, TYRE = (0.03, 0.04, 0.05), (0.015, 0.015, 0.015)


@dataclass(frozen=True)
class Light:
    """Sun and sky.

    Attributes:
        towards: unit vector to the sun.
        sun, sky: colour and strength of direct and of diffuse light, linear.
    """

    towards: tuple[float, float, float]
    sun: tuple[float, float, float]
    sky: tuple[float, float, float]

    @staticmethod
    def from_angles(azimuth: float, elevation: float, strength: float, warmth: float) -> Light:
        """``warmth`` 0 is white, 1 the orange of a low sun, -1 the blue of an overcast day."""
        tint = (1 + 0.3 * warmth, 1.0, 1 - 0.45 * warmth)
        towards = (
            math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation),
        )  # fmt: skip
        return Light(towards, tuple(strength * c for c in tint), (0.22 * strength, 0.26 * strength, 0.34 * strength))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Car:
    """A car: where it is at time 0, how fast it goes, which way it looks (1: as the camera, -1: towards it)."""

    x: float
    z: float
    speed: float
    way: int
    paint: tuple[float, float, float]
    tall: bool

    def shapes(self, seconds: float, owner: int) -> list[Shape]:
        z = self.z + self.way * self.speed * seconds

        def part(
            centre: tuple[float, float, float],
            half: tuple[float, float, float],
            colour: tuple[float, float, float],
            ball: bool = False,
        ) -> Shape:
            x, y, ahead = centre
            return Shape((self.x + self.way * x, y, z + self.way * ahead), half, colour, owner=owner, round=ball)

        roof = 1.75 if self.tall else 1.42
        shade = tuple(0.8 * c for c in self.paint)
        parts = [
            part((0, 0.62, 0), (0.88, 0.32, 2.1), self.paint),
            part((0, 0.42, 0), (0.86, 0.14, 2.18), (0.05, 0.05, 0.05)),  # bumpers
            part((0, (0.9 + roof) / 2, -0.35), (0.76, (roof - 0.9) / 2, 1.2), GLASS),
            part((0, roof, -0.35), (0.78, 0.05, 1.1), self.paint),
            part((0, 0.93, 1.3), (0.86, 0.14, 0.85), shade, True),  # type: ignore[arg-type]
        ]
        for side in (-1, 1):
            parts.append(part((side * 0.76, (0.9 + roof) / 2, -0.35), (0.05, (roof - 0.9) / 2, 0.07), self.paint))
            parts.append(part((side * 0.74, (0.9 + roof) / 2, -1.5), (0.06, (roof - 0.9) / 2, 0.07), self.paint))
            parts.append(part((side * 0.66, 0.76, -2.08), (0.2, 0.1, 0.04), (0.7, 0.01, 0.01)))  # rear lights
            parts.append(part((side * 0.64, 0.72, 2.08), (0.2, 0.09, 0.04), (0.95, 0.95, 0.8)))  # head lights
            for axle in (-1.3, 1.35):
                parts.append(part((side * 0.8, 0.33, axle), (0.13, 0.33, 0.33), TYRE, True))
        parts.append(part((0, 0.6, -2.1), (0.28, 0.08, 0.03), (0.8, 0.8, 0.75)))  # number plate
        return parts


@dataclass(frozen=True)
class Road:
    """A drive: what stands by the road, the cars, the light, and the camera's speed (metres a second)."""

    roadside: tuple[Shape, ...]
    cars: tuple[Car, ...]
    light: Light
    speed: float

    @staticmethod
    def random(generator: torch.Generator, frames: int) -> Road:
        speed = uniform(generator, 5, 11)
        reach = 75 + speed * SECONDS_PER_FRAME * frames
        light = Light.from_angles(
            # Along the road rather than across it, where houses would keep it in the shade.
            math.radians(uniform(generator, 20, 60) * (1 if pick(generator, 2) else -1)) + math.pi * pick(generator, 2),
            math.radians(uniform(generator, 30, 50)),
            uniform(generator, 1.1, 1.4), uniform(generator, 0.0, 0.35),
        )  # fmt: skip
        return Road(_roadside(generator, reach), _cars(generator, speed), light, speed)

    def camera(self, frame: int) -> Camera:
        z = self.speed * SECONDS_PER_FRAME * frame
        return Camera((LANE / 2, 1.65, z), (LANE / 2 - 0.35, 1.25, z + 12), 42.0)

    def frame(self, frame: int, height: int, width: int, other: Light) -> tuple[Tensor, Tensor, Tensor]:
        """(target, condition [3, H, W] in [-1, 1], mask [1, H, W]) of one frame.

        The condition has the cars under ``other`` light: they cast no shadow, and none falls on them. The mask covers
        every pixel with a part of a car, or of the shadow of one, in it.
        """
        shapes = list(self.roadside)
        for k, car in enumerate(self.cars):
            shapes += car.shapes(SECONDS_PER_FRAME * frame, k + 1)
        scene, camera = Scene(shapes), self.camera(frame)
        parts = []
        for rows in camera.rays(SUBPIXELS * height, SUBPIXELS * width).split(1 << 15):
            parts.append(self._shade(scene, camera, rows, SUBPIXELS * height, other))
        target, condition, changed = (torch.cat(values) for values in zip(*parts))
        mean = [mean_of_subpixels(x, height, width, SUBPIXELS) for x in (target, condition, changed)]
        return to_pixels(mean[0]), to_pixels(mean[1]), (mean[2] > 0).float()

    def _shade(
        self, scene: Scene, camera: Camera, rays: Tensor, height: int, other: Light
    ) -> tuple[Tensor, Tensor, Tensor]:
        origin = torch.tensor(camera.position)
        hits = cast(scene, origin, rays)
        pixel_angle = 1 / camera.focal(height)
        surface = albedo(scene, hits, rays, pixel_angle)
        ground = hits.found & (hits.shape == 0) & (hits.normal[:, 1] > 0.5)
        surface[ground] = _ground(hits, ground, pixel_angle)
        owner = torch.where(hits.found, scene.owner[hits.shape], 0)
        car = owner > 0
        towards = torch.tensor(self.light.towards)
        by_scene, by_cars = blocked(scene, hits, towards)
        true = _lit(surface, hits, rays, self.light, ~(by_scene | by_cars), car)
        without = _lit(surface, hits, rays, self.light, ~by_scene, car)
        wrong = _lit(surface, hits, rays, other, torch.ones_like(car), car)
        pasted = torch.where(car[:, None], wrong, without)
        sky = _sky(rays, self.light)
        haze = (1 - torch.exp(-hits.distance / 350))[:, None]  # distant things take the colour of the horizon
        horizon = _sky(torch.tensor([[0.0, 0.0, 1.0]]), self.light)

        def finish(light: Tensor) -> Tensor:
            return torch.where(hits.found[:, None], light * (1 - haze) + horizon * haze, sky)

        changed = car | (by_cars & ~by_scene & hits.found)
        return finish(true), finish(pasted), changed[:, None].float()


def _lit(surface: Tensor, hits: Hits, rays: Tensor, light: Light, visible: Tensor, glossy: Tensor) -> Tensor:
    towards, sun, sky = torch.tensor(light.towards), torch.tensor(light.sun), torch.tensor(light.sky)
    direct = (hits.normal @ towards).clamp(min=0) * visible
    open_sky = (0.65 + 0.35 * hits.normal[:, 1])[:, None]
    colour = surface * (direct[:, None] * sun + open_sky * sky)
    mirrored = rays - 2 * (rays * hits.normal).sum(1, keepdim=True) * hits.normal
    shine = ((mirrored @ towards).clamp(min=0) ** 40 * visible)[:, None] * sun * 0.7
    facing = 1 - (rays * hits.normal).sum(1).abs()
    reflection = (0.06 + 0.4 * facing**4)[:, None] * sky * (mirrored[:, 1:2] > 0)
    return colour + torch.where(glossy[:, None], shine + reflection, 0)


def _sky(rays: Tensor, light: Light) -> Tensor:
    height = rays[:, 1:2].clamp(min=0)
    horizon, zenith = torch.tensor([0.72, 0.78, 0.85]), torch.tensor([0.18, 0.36, 0.72])
    blend = 1 - torch.exp(-4 * height)
    return (horizon * (1 - blend) + zenith * blend) * max(light.sun[1], 0.8)


def _ground(hits: Hits, chosen: Tensor, pixel_angle: float) -> Tensor:
    """Colour of the ground at hits [k, 3]: asphalt with lane marks, a kerb, a pavement, grass."""
    x, z = hits.position[chosen, 0], hits.position[chosen, 2]
    distance = hits.distance[chosen]
    width = distance * pixel_angle / hits.normal.new_tensor(0.15)

    def photo(index: int, metres: float) -> Tensor:
        level = (width * 256 / metres).clamp(min=1).log2().clamp(max=8)
        return sample(torch.full_like(x, index, dtype=torch.long), x / metres, z / metres, level)

    grain = photo(GRAVEL, 3.0).mean(1, keepdim=True)
    colour = (0.12 + 0.2 * grain) * torch.tensor([1.0, 1.0, 1.03])
    dashed = (x.abs() - LANE).abs() < 0.08
    paint = dashed & ((z % 6) < 3)
    paint |= (x.abs() - (HALF_ROAD - 0.25)).abs() < 0.08
    paint |= (x.abs() - 0.16).abs() < 0.07  # the double line between the two ways
    colour = torch.where(paint[:, None], torch.tensor([0.78, 0.78, 0.74]), colour)
    pavement = (x.abs() > HALF_ROAD) & (x.abs() < HALF_ROAD + 2.2)
    slab = 0.30 + 0.12 * grain - 0.1 * ((z % 1.5) < 0.06)[:, None]
    colour = torch.where(pavement[:, None], slab.expand(-1, 3), colour)
    kerb = (x.abs() > HALF_ROAD) & (x.abs() < HALF_ROAD + 0.22)
    colour = torch.where(kerb[:, None], torch.tensor([0.5, 0.5, 0.48]), colour)
    lawn = x.abs() >= HALF_ROAD + 2.2
    green = photo(GRASS, 4.0) * torch.tensor([0.75, 1.0, 0.4]) * 1.1
    return torch.where(lawn[:, None], green, colour)


def _roadside(generator: torch.Generator, reach: float) -> tuple[Shape, ...]:
    """The ground first (shape 0), then houses, trees and lamp posts along both sides."""
    shapes = [Shape((0.0, -1.0, reach / 2), (60.0, 1.0, reach))]
    for side in (-1, 1):
        z = uniform(generator, -6, 4)
        while z < reach:
            deep, high, wide = uniform(generator, 4, 7), uniform(generator, 2.5, 6), uniform(generator, 4, 8)
            tint = tuple(uniform(generator, 0.5, 1.7) for _ in range(3))
            x = side * (HALF_ROAD + 5.5 + wide + uniform(generator, 0, 3))
            texture = (BRICK, BRICK, GRAVEL)[pick(generator, 3)]
            shapes.append(Shape((x, high, z + deep), (wide, high, deep), tint, texture=texture, metres=4.0))  # type: ignore[arg-type]
            shapes.append(Shape((x, 2 * high + 0.3, z + deep), (wide + 0.4, 0.3, deep + 0.4), (0.22, 0.09, 0.06)))
            shapes += _windows(x - side * wide, high, z, deep)
            z += 2 * deep + uniform(generator, 2, 9)
        z = uniform(generator, 4, 10)
        while z < reach:
            x = side * (HALF_ROAD + 3.4 + uniform(generator, 0, 1))
            size = uniform(generator, 1.2, 2.0)
            shapes.append(Shape((x, 1.2, z), (0.16, 1.3, 0.16), (0.13, 0.08, 0.05)))
            shapes.append(
                Shape((x, 2.2 + size, z), (size, 1.15 * size, size), (0.5, 1.0, 0.3), texture=GRASS, round=True)
            )
            z += uniform(generator, 8, 16)
        for k in range(int(reach / 25)):
            z = 12 + 25 * k + 5 * side
            shapes.append(Shape((side * (HALF_ROAD + 0.8), 2.8, z), (0.07, 2.8, 0.07), (0.2, 0.2, 0.22)))
            shapes.append(Shape((side * (HALF_ROAD + 0.1), 5.6, z), (0.8, 0.06, 0.12), (0.3, 0.3, 0.32)))
    return tuple(shapes)


def _windows(front: float, high: float, z: float, deep: float) -> list[Shape]:
    """One long band of glass a storey on the wall towards the road."""
    storeys = max(1, int(2 * high / 3))
    return [
        Shape((front, 1.9 + 3 * k, z + deep), (0.04, 0.65, 0.8 * deep), (0.06, 0.08, 0.11))
        for k in range(storeys)
    ]  # fmt: skip


def _cars(generator: torch.Generator, speed: float) -> tuple[Car, ...]:
    """One car ahead, one that comes towards the camera, one parked or in the next lane."""

    def new(x: float, z: float, pace: float, way: int) -> Car:
        return Car(x, z, pace, way, PAINTS[pick(generator, len(PAINTS))], bool(pick(generator, 2)))

    ahead = new(LANE / 2, uniform(generator, 8, 12), speed + uniform(generator, -1, 2.5), 1)
    oncoming = new(-LANE / 2 - LANE * pick(generator, 2), uniform(generator, 20, 36), uniform(generator, 5, 11), -1)
    beside = new(1.5 * LANE, uniform(generator, 11, 19), uniform(generator, 0.4, 0.9) * speed, 1)
    return ahead, oncoming, beside


def wrong_light(light: Light, generator: torch.Generator) -> Light:
    """A sun from another side (90 to 270 degrees away), another height, another strength and another tint."""
    azimuth = math.atan2(light.towards[0], light.towards[2]) + math.radians(uniform(generator, 90, 270))
    strength = light.sun[1] * (0.5 if pick(generator, 2) else 1.5)
    warmth = uniform(generator, 0.5, 0.9) * (1 if pick(generator, 2) else -1)
    return Light.from_angles(azimuth, math.radians(uniform(generator, 12, 60)), strength, warmth)
