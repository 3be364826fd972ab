"""The rendered tasks: ray casting and splats against closed forms, under-fitting that is real, cars and shadows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from bench.tasks import TASKS
from bench.tasks.scenes.raycast import FAR, Camera, Scene, Shape, blocked, cast
from bench.tasks.scenes.road import Light, Road, wrong_light
from bench.tasks.scenes.splats import Splats, fit, render

ROOM = replace(TASKS["artifact-removal"], cache=None)


def test_rays_meet_boxes_and_balls_where_geometry_says():
    scene = Scene(
        [
            Shape((0, 0, 5), (1, 1, 1), round=True),
            Shape((0, 0, 9), (2, 2, 1), yaw=0.0),
            Shape((6, 0, 5), (1, 1, 1), yaw=np.pi / 4),
        ]
    )
    rays = torch.tensor([[0.0, 0, 1], [0.0, 1, 0], [6 - 0.5**0.5, 0, 5 - 0.5**0.5], [1.8, 0, 8.0], [0.0, 0, -1]])
    rays = rays / rays.norm(dim=1, keepdim=True)
    hits = cast(scene, torch.zeros(3), rays)
    assert hits.distance[0] == pytest.approx(4)  # the ball's front
    assert hits.distance[1] == FAR and hits.distance[4] == FAR
    torch.testing.assert_close(hits.position[2], torch.tensor([6 - 0.5**0.5, 0, 5 - 0.5**0.5]))  # amid a turned face
    torch.testing.assert_close(hits.normal[2], torch.tensor([-(0.5**0.5), 0, -(0.5**0.5)]))
    torch.testing.assert_close(hits.position[3], torch.tensor([1.8, 0, 8.0]))  # past the ball, on the box behind
    torch.testing.assert_close(hits.normal[[0, 3]], torch.tensor([[0.0, 0, -1], [0.0, 0, -1]]))


def test_shadows_fall_where_the_light_is_blocked_and_know_by_whom():
    floor, ball = Shape((0, -1, 0), (9, 1, 9)), Shape((0, 2, 0), (1, 1, 1), round=True, owner=1)
    wall = Shape((6, 2, 0), (0.5, 2, 2))
    scene = Scene([floor, ball, wall])
    camera = torch.tensor([0.0, 1.0, -8.0])
    spots = torch.tensor([[0.0, 0, 0], [0.9, 0, 0], [1.1, 0, 0], [6.0, 0, 0.0], [-3.0, 0, 0]])
    rays = spots - camera
    hits = cast(scene, camera, rays / rays.norm(dim=1, keepdim=True))
    by_scene, by_others = blocked(scene, hits, torch.tensor([0.0, 1.0, 0.0]))
    assert by_others[[0, 1, 2, 4]].tolist() == [True, True, False, False]
    assert by_scene[[0, 1, 2, 4]].tolist() == [False] * 4
    slanted = torch.nn.functional.normalize(torch.tensor([3.0, 1.0, 0.0]), dim=0)  # low: the wall's shadow reaches far
    assert blocked(scene, hits, slanted)[0][[0, 4]].tolist() == [True, True]


def brute_force(splats, camera, height, width):
    """Every splat on every pixel, in a loop, in float64."""
    view = (splats.position.double() - torch.tensor(camera.position).double()) @ camera.axes().double().T
    focal = camera.focal(height)
    picture = torch.zeros(3, height, width, dtype=torch.float64)
    clear = torch.ones(height, width, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for k in view[:, 2].argsort().tolist():
        if view[k, 2] <= 0.1:
            continue
        cx, cy = view[k, 0] / view[k, 2] * focal + width / 2, view[k, 1] / view[k, 2] * focal + height / 2
        variance = (splats.log_radius[k].double().exp() * focal / view[k, 2]) ** 2 + 0.3
        alpha = splats.opacity[k].double().sigmoid() * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2 / variance)
        alpha = alpha.clamp(max=0.99)
        picture += splats.colour[k].double().sigmoid()[:, None, None] * alpha * clear
        clear = clear * (1 - alpha)
    return picture


def cloud(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    position = torch.randn(count, 3, generator=g) + torch.tensor([0.0, 0.0, 4.0])
    return Splats(
        position,
        torch.randn(count, generator=g) * 0.3 - 2.2,
        torch.randn(count, 3, generator=g),
        torch.randn(count, generator=g),
    )


@pytest.mark.parametrize("size", [(24, 32), (19, 13)])
def test_tiles_composite_as_a_loop_over_all_splats_does(size):
    camera = Camera((0.3, 0.2, -1.0), (0.0, 0.0, 4.0))
    picture = render(cloud(60), camera, *size, most=60)
    exact = brute_force(cloud(60), camera, *size)
    assert exact.max() > 0.3
    # Beyond three standard deviations a tile does not see a splat: exp(-4.5) = 0.011 of its opacity at most.
    assert (picture.double() - exact).abs().max() < 0.02
    assert (picture.double() - exact).abs().mean() < 0.001


def test_the_camera_sees_right_on_the_right_and_up_on_top():
    for position, place in (((1.0, 0, 4.0), (16, 24)), ((0.0, 1, 4.0), (8, 16))):
        one = Splats(torch.tensor([position]), torch.tensor([-2.0]), torch.full((1, 3), 4.0), torch.tensor([4.0]))
        picture = render(one, Camera((0, 0, 0), (0, 0, 1), 53.13), 32, 32)[0]
        row, column = divmod(int(picture.argmax()), 32)
        assert abs(row - place[0]) <= 1 and abs(column - place[1]) <= 1


def test_splats_and_rays_agree_on_the_picture_plane():
    camera = Camera((0.4, 1.2, -2.0), (0.1, 0.9, 1.0), 58.0)
    rays = camera.rays(24, 40)
    for pixel in (0, 39, 12 * 40 + 20, 24 * 40 - 1):
        position = torch.tensor(camera.position) + 3.0 * rays[pixel]
        one = Splats(position[None], torch.tensor([-9.0]), torch.full((1, 3), 4.0), torch.tensor([6.0]))
        assert int(render(one, camera, 24, 40)[0].argmax()) == pixel


def test_the_renderer_is_differentiable_in_everything():
    splats = Splats(*(p.requires_grad_(True) for p in cloud(40).parameters()))
    camera = Camera((0.0, 0.0, -1.0), (0.0, 0.0, 4.0))
    loss = render(splats, camera, 16, 16).square().sum()
    loss.backward()
    for p in splats.parameters():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            values = []
            for step in (1e-3, -1e-3):
                moved = [q + step * direction if q is p else q for q in splats.parameters()]
                values.append(render(Splats(*moved), camera, 16, 16).double().square().sum())
        slope = (values[0] - values[1]) / 2e-3
        assert (p.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.05, abs=0.02)


def test_fitting_lowers_the_error():
    camera = Camera((0.0, 0.0, -1.0), (0.0, 0.0, 4.0))
    view = render(cloud(40, seed=1), camera, 16, 16) * 2 - 1
    start = cloud(40, seed=2)
    before, after = (
        ((render(s, camera, 16, 16) * 2 - 1) - view).abs().mean() for s in (start, fit(start, [camera], [view], 60))
    )
    assert after < 0.5 * before


def test_fitted_frames_are_better_than_frames_between():
    """Under-fitting is real: nothing else tells these frames apart."""
    gaps = []
    for seed in range(2):
        pair = ROOM.clip(seed, 9, 48, 48)
        values = [
            peak_signal_noise_ratio(pair.target[:, k].numpy(), pair.condition[:, k].numpy(), data_range=2)
            for k in range(9)
        ]
        assert ROOM.fitted_frames(9) == [0, 8]
        gaps.append(np.mean([values[0], values[8]]) - np.mean(values[1:8]))
        assert 15 < np.mean(values) < 34
    assert min(gaps) > 1.0


def test_more_views_leave_less_to_remove():
    sparse, dense = (replace(ROOM, every=k, steps_per_view=160 // n).clip(1, 9, 32, 32) for k, n in ((8, 2), (2, 5)))
    assert torch.equal(sparse.target, dense.target)
    errors = [(p.condition - p.target)[:, 1::2].square().mean() for p in (sparse, dense)]
    assert errors[1] < 0.8 * errors[0]


def test_fits_are_kept_and_belong_to_their_settings(tmp_path):
    task = replace(ROOM, cache=tmp_path, splats_per_view=100, steps_per_view=2)
    first = task.clip(0, 3, 16, 16)
    (kept,) = tmp_path.iterdir()
    assert torch.equal(task.clip(0, 3, 16, 16).condition, first.condition)
    torch.save(torch.zeros(3, 3, 16, 16), kept)
    assert task.clip(0, 3, 16, 16).condition.eq(0).all()  # it is read, not made again
    replace(task, steps_per_view=3).clip(0, 3, 16, 16)
    task.clip(1, 3, 16, 16)
    assert len(list(tmp_path.iterdir())) == 3


def test_cars_lose_their_shadow_and_their_light():
    darker, changed = 0, []
    for seed in range(6):
        pair = TASKS["driving"].clip(seed, 2, 40, 60)
        assert 0.01 < pair.mask.mean() < 0.5
        difference = (pair.condition - pair.target).mean(0, keepdim=True)
        darker += int((difference > 0.1).sum())  # where the target has a shadow, or a darker side
        changed.append(difference[pair.mask > 0].abs().mean().item())
    assert darker > 100
    assert min(changed) > 0.05


def test_the_condition_has_no_shadow_of_a_car_on_the_road():
    seen = 0
    for seed in range(4):
        road = Road.random(torch.Generator().manual_seed(seed), 2)
        black = Light(road.light.towards, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
        target, condition, mask = road.frame(0, 40, 60, road.light)
        cars = (condition != road.frame(0, 40, 60, black)[1]).any(0)
        shadow = (mask[0] > 0) & ~cars
        seen += int(shadow.sum())
        brighter = (condition - target).mean(0)
        assert (brighter[shadow] > 0).all() and brighter[shadow].mean() > 0.1
    assert seen > 40


def test_only_cars_and_their_shadows_change():
    """Without cars condition and target are one picture; the scene keeps its own shadows."""
    generator = torch.Generator().manual_seed(0)
    road = Road.random(generator, 3)
    other = wrong_light(road.light, generator)
    target, condition, mask = replace(road, cars=()).frame(0, 32, 48, other)
    assert torch.equal(target, condition) and mask.sum() == 0
    dark = replace(road, light=replace(road.light, sun=(0.0, 0.0, 0.0)))
    target, condition, mask = dark.frame(0, 32, 48, dark.light)
    torch.testing.assert_close(target, condition)  # no sun, so no shadow to lose


def test_the_wrong_sun_stands_elsewhere():
    light = Light.from_angles(0.4, 0.7, 1.0, 0.2)
    assert sum(c * c for c in light.towards) == pytest.approx(1)
    for seed in range(20):
        other = wrong_light(light, torch.Generator().manual_seed(seed))
        ground = light.towards[0] * other.towards[0] + light.towards[2] * other.towards[2]
        assert ground <= 1e-6  # at least a quarter turn away
        assert abs(np.log(other.sun[1] / light.sun[1])) > 0.3
