"""A small differentiable renderer of isotropic Gaussian splats, and their fit to views.

The compositing of 3D Gaussian Splatting (Kerbl et al. 2023, arXiv 2308.04079) with round splats of one colour each:
sorted by depth, and per pixel  sum_k c_k a_k prod_{l<k} (1 - a_l),  a_k = opacity exp(-d^2 / 2 r^2). The picture is cut
into tiles, and each tile looks only at the splats that reach it. All of it is ordinary torch: autograd does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.tasks.scenes.raycast import Camera

TILE = 8
SIGMAS = 3.0
NEAR = 0.1
LOWPASS = 0.3  # pixels squared: no splat is thinner than the pixel grid can show


@dataclass(frozen=True)
class Splats:
    """``position`` [n, 3] in metres; ``log_radius`` [n]; ``colour`` [n, 3] and ``opacity`` [n] before the sigmoid."""

    position: Tensor
    log_radius: Tensor
    colour: Tensor
    opacity: Tensor

    def parameters(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def render(splats: Splats, camera: Camera, height: int, width: int, most: int = 256) -> Tensor:
    """[3, height, width] in [0, 1] on black, differentiable in the splats.

    Args:
        most: splats that a tile looks at, nearest first.

    Cost: about tiles * splats per tile * 64 exponentials and as much memory for the backward pass.
    """
    rows, columns = -(-height // TILE), -(-width // TILE)
    view = (splats.position - torch.tensor(camera.position)) @ camera.axes().T
    depth = view[:, 2]
    order = depth.detach().argsort()
    order = order[depth.detach()[order] > NEAR]
    view, depth = view[order], depth[order]
    focal = camera.focal(height)
    centre = view[:, :2] / depth[:, None] * focal + torch.tensor([width / 2, height / 2])
    variance = (splats.log_radius[order].exp() * focal / depth) ** 2 + LOWPASS
    index, used = _splats_of_tiles(centre.detach(), variance.detach().sqrt(), rows, columns, most)
    pixel = torch.arange(TILE) + 0.5
    xs = (torch.arange(columns) * TILE)[None, :, None] + pixel  # [1, columns, TILE]
    ys = (torch.arange(rows) * TILE)[:, None, None] + pixel
    tiles, k = index.shape
    xs = xs.expand(rows, -1, -1).reshape(tiles, 1, TILE)
    ys = ys.expand(-1, columns, -1).reshape(tiles, 1, TILE)
    # The Gaussian is a product of one factor for x and one for y: TILE + TILE exponentials for TILE^2 pixels.
    fall = -0.5 / variance[index]
    along_x = torch.exp((xs - centre[index, 0, None]) ** 2 * fall[..., None])
    along_y = torch.exp((ys - centre[index, 1, None]) ** 2 * fall[..., None])
    strength = splats.opacity[order][index].sigmoid() * used
    alpha = (strength[..., None, None] * along_y[..., :, None] * along_x[..., None, :]).clamp(max=0.99)
    alpha = alpha.reshape(tiles, k, TILE * TILE)
    clear = torch.log1p(-alpha)
    weight = alpha * torch.exp(clear.cumsum(1) - clear)  # transmittance up to, and without, this splat
    colour = splats.colour[order][index].sigmoid()
    picture = torch.einsum("tkp,tkc->ctp", weight, colour)
    picture = picture.view(3, rows, columns, TILE, TILE).transpose(2, 3).reshape(3, rows * TILE, columns * TILE)
    return picture[:, :height, :width]


def _splats_of_tiles(centre: Tensor, radius: Tensor, rows: int, columns: int, most: int) -> tuple[Tensor, Tensor]:
    """Indices [tiles, k] of the nearest splats that reach each tile, in order of depth, and whether each is one."""
    reach = SIGMAS * radius

    def touches(along: Tensor, count: int) -> Tensor:
        start = torch.arange(count)[:, None] * TILE
        return (along + reach > start) & (along - reach < start + TILE)

    touching = (touches(centre[:, 1], rows)[:, None] & touches(centre[:, 0], columns)[None]).flatten(0, 1)
    k = max(1, min(most, int(touching.sum(1).max()))) if touching.numel() else 1
    rank = touching.cumsum(1) - 1
    kept = touching & (rank < k)
    tile, splat = kept.nonzero(as_tuple=True)
    index = torch.zeros(rows * columns, k, dtype=torch.long)
    used = torch.zeros(rows * columns, k)
    index[tile, rank[tile, splat]] = splat
    used[tile, rank[tile, splat]] = 1
    return index, used


def seed_splats(
    cameras: Sequence[Camera], views: Sequence[Tensor], depths: Sequence[Tensor], count: int, generator: torch.Generator
) -> Splats:
    """Splats on the surfaces that the views see, as a sparse reconstruction would give: a share at the right depth, the
    rest anywhere between half and twice of it (wrong matches). The fit may move them.
    """
    shares = [count // len(views) + (k < count % len(views)) for k in range(len(views))]
    positions, colours, radii = [], [], []
    for camera, view, depth, share in zip(cameras, views, depths, shares):
        height, width = depth.shape
        pixel = torch.randint(height * width, (share,), generator=generator)
        error = torch.randn(share, generator=generator) * 0.02
        stray = torch.rand(share, generator=generator) < 0.3
        error = torch.where(stray, torch.rand(share, generator=generator) * 1.4 - 0.7, error)
        distance = depth.flatten()[pixel] * error.exp()
        positions.append(torch.tensor(camera.position) + distance[:, None] * camera.rays(height, width)[pixel])
        colours.append(((view.flatten(1)[:, pixel].T + 1) / 2).clamp(0.02, 0.98).logit())
        # Splats of one view cover the picture about once.
        radii.append((0.6 * (height * width / share) ** 0.5 * distance / camera.focal(height)).log())
    n = sum(shares)
    return Splats(torch.cat(positions), torch.cat(radii), torch.cat(colours), torch.full((n,), 0.5))


def fit(splats: Splats, cameras: Sequence[Camera], views: Sequence[Tensor], steps: int) -> Splats:
    """Adam on the L1 error of one view a step, the views in turn (views [3, H, W] in [-1, 1])."""
    with torch.enable_grad():
        splats = Splats(*(p.detach().clone().requires_grad_(True) for p in splats.parameters()))
        rates = (0.01, 0.03, 0.05, 0.05)
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": r} for p, r in zip(splats.parameters(), rates)], betas=(0.9, 0.99)
        )
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / max(1, steps)))
        for step in range(steps):
            k = step % len(views)
            picture = render(splats, cameras[k], *views[k].shape[1:])
            optimizer.zero_grad()
            F.l1_loss(picture, (views[k] + 1) / 2).backward()
            optimizer.step()
            decay.step()
    return Splats(*(p.detach() for p in splats.parameters()))
