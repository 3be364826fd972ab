"""How far back can a frame see at all? ``python analysis/receptive_field.py``.

Stacked causal convolutions have a finite temporal receptive field R (in frame groups): beyond it the influence is
exactly zero, whatever the weights, so a truncation distance of R gives the exact gradient and temporal locality is a
statement about distances below R. That holds with normalisation over the frames of a group (CogVideoX) too: it mixes
within a group, but only caches lead to the group before, one convolution after another.

R is structure: random weights in float64 show it best, because nothing is zero by accident; the trained weights of the
embedded decoders are checked too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional as F

import chopgrad
from analysis.locality.influence import decode_with_leaves
from analysis.real_clips import output_folder
from chopgrad import CausalDecoder, Chop, Full
from suite.claims import Claim, Verdict
from suite.command_line import run_main
from suite.printing import print_claims
from suite.progress import track
from suite.records import Record, provenance, read_record, write_record
from suite.vaes import load_vae

CAUSAL_CONVOLUTIONS = ("WanCausalConv3d", "QwenImageCausalConv3d", "CogVideoXCausalConv3d")
GROUPS = 44  # more than any decoder here can look back


@dataclass
class Config:
    """Settings of the search for the receptive field."""

    full: bool = False
    """Compare the library's gradients for the trained weights too, not only for random ones."""
    out: Path | None = None
    """Folder of the record. None: results/theory with --full, else runs/theory."""


def untrained(vae: Any, seed: int = 0) -> Any:
    """The same architecture with random weights, in the same dtype and on the same device."""
    torch.manual_seed(seed)
    return type(vae).from_config(vae.config).to(vae.device, vae.dtype).eval().requires_grad_(False)


def published_wan(seed: int = 0) -> Any:
    """The published Wan 2.1 decoder's blocks (two residual blocks a level), narrow: width does not change R."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    return vae.double().eval()


def published_cogvideox(seed: int = 0) -> Any:
    """The published CogVideoX decoder's blocks (three layers a level), narrow."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=3, norm_num_groups=2
    )
    return vae.double().eval()


def reach(decoder: CausalDecoder, latent_frames: int, size: int = 1, seed: int = 0) -> list[float]:
    """|dL/dz_j| for a random adjoint of the last group's frames, by distance 0, 1, ... in frame groups.

    Cost: one decode of ``latent_frames`` latents of size x size, and one backward pass.
    """
    latents, generator = _random_latents(decoder, latent_frames, size, seed)
    zs, frames = decode_with_leaves(decoder, latents)
    adjoint = torch.randn(frames[-1].shape, generator=generator, dtype=torch.float64).to(latents)
    gradients = torch.autograd.grad(frames[-1], zs, adjoint, allow_unused=True)
    # The largest entry, because squares of such small numbers would vanish.
    return [0.0 if g is None else g.abs().max().item() for g in reversed(gradients)]


def receptive_field(sizes: list[float]) -> int | None:
    """R: the largest distance with any influence; None if the very first group still has some (R is larger)."""
    last = max((d for d, x in enumerate(sizes) if x > 0), default=0)
    return None if last == len(sizes) - 1 else last


def predicted_receptive_field(decoder: CausalDecoder) -> int:
    """R from the architecture: the temporal look-back of the causal convolutions in series, added up.

    A convolution with a kernel of k feature frames looks back k - 1 of them. Where nothing else mixes frames, the
    look-backs add up in video frames, and R is their sum in groups, rounded up. Where a norm mixes the frames of a
    group (GroupNorm), each convolution reaches back ceil((k - 1) / feature frames of a group) whole groups, and those
    add up. Shortcuts lie beside a longer path and add nothing.

    Cost: two decoded groups of one latent pixel.
    """
    group = decoder.frame_groups(latents_for_groups(decoder, 2))[-1]
    latents, _ = _random_latents(decoder, group.latents.stop, 1, 0)
    mixes = any(isinstance(m, nn.GroupNorm) for m in decoder.vae.decoder.modules())
    lengths: list[tuple[int, int]] = []  # (kernel, feature frames of a group) of each convolution passed

    def note(module: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        kernel = module.time_kernel_size if hasattr(module, "time_kernel_size") else module.kernel_size[0]
        if kernel > 1:
            lengths.append((kernel, inputs[0].shape[2]))

    hooks = [
        m.register_forward_hook(note)
        for name, m in decoder.vae.decoder.named_modules()
        if type(m).__name__ in CAUSAL_CONVOLUTIONS and "shortcut" not in name
    ]
    try:
        with torch.no_grad():
            state = decoder.initial_state()
            for each in decoder.frame_groups(group.latents.stop):
                lengths.clear()
                _, state = decoder.step(latents[:, :, each.latents], state)
    finally:
        for hook in hooks:
            hook.remove()
    if mixes:
        return sum(-(-(kernel - 1) // frames) for kernel, frames in lengths)
    return math.ceil(sum(Fraction(kernel - 1, frames) for kernel, frames in lengths))


def library_difference(decoder: CausalDecoder, distance: int, latent_frames: int, seed: int = 0) -> float:
    """Relative difference between ``Chop(distance)`` and ``Full()`` in the gradient of the MSE to a black video."""
    latents, _ = _random_latents(decoder, latent_frames, 1, seed)
    with torch.no_grad():
        target = torch.zeros_like(decoder.decode(latents))
    gradients = []
    for strategy in (Chop(distance), Full()):
        leaf = latents.clone().requires_grad_()
        loss = chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    chop, full = gradients
    return ((chop - full).norm() / full.norm()).item()


def _random_latents(decoder: CausalDecoder, count: int, size: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    like = next(iter(decoder.parameters()))
    shape = (1, decoder.latent_channels, count, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like), generator


def latents_for_groups(decoder: CausalDecoder, groups: int) -> int:
    """The smallest number of latents that decode in that many groups."""
    return next(n for n in range(1, 100 * groups) if len(decoder.frame_groups(n)) >= groups)


def measure(config: Config) -> Record:
    dtype = torch.float64
    wan, cog = load_vae("wan2.1", dtype=dtype), load_vae("cogvideox", dtype=dtype)
    cases: dict[str, Any] = {
        "wan2.1, embedded, trained": wan,
        "wan2.1, embedded, random weights": untrained(wan),
        "wan2.1, published blocks, random weights": published_wan(),
        "cogvideox, embedded, trained": cog,
        "cogvideox, embedded, random weights": untrained(cog),
        "cogvideox, published blocks, random weights": published_cogvideox(),
    }
    rows: list[dict[str, Any]] = []
    for name, vae in track(cases.items(), description="receptive field"):
        decoder = chopgrad.decoder_for(vae.requires_grad_(False))
        latent_frames = latents_for_groups(decoder, GROUPS)
        sizes = reach(decoder, latent_frames)
        found = receptive_field(sizes)
        row: dict[str, Any] = {
            "decoder": name,
            "receptive_field_groups": found,
            "predicted_groups": predicted_receptive_field(decoder),
            "searched_groups": len(sizes),
            "largest_gradient_by_distance": sizes,
        }
        if found is not None:
            row["receptive_field_frames"] = decoder.frame_count(latents_for_groups(decoder, found + 1))
            if "embedded" in name and ("random" in name or config.full):
                count = latents_for_groups(decoder, found + 3)
                row["library_relative_difference_at_R"] = library_difference(decoder, found, count)
        rows.append(row)
    path = output_folder(config.out, config.full) / "receptive_field.json"
    settings = {"full": config.full, "searched_groups": GROUPS, "dtype": "float64", "seed": 0}
    metrics = {"decoders": rows, "claims": [asdict(c) for c in claims(rows)]}
    return read_record(write_record(path, settings, metrics, provenance()))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Two statements: R exists and truncation there is exact; and it follows from the number of convolutions."""
    finite = [r for r in rows if r["receptive_field_groups"] is not None]
    exact = [r["library_relative_difference_at_R"] for r in rows if "library_relative_difference_at_R" in r]
    every: Verdict = "holds" if len(finite) == len(rows) and all(x == 0 for x in exact) else "fails"
    right = all(r["receptive_field_groups"] == r["predicted_groups"] for r in rows)
    predicted: Verdict = "holds" if right else "fails"
    if not finite or not exact:
        every = predicted = "undecided"
    fields = "; ".join(
        f"{r['decoder']}: R = {r['receptive_field_groups']} groups ({r['receptive_field_frames']} frames)"
        if r["receptive_field_groups"] is not None
        else f"{r['decoder']}: none within {r['searched_groups']} groups"
        for r in rows
    )
    pairs = "; ".join(f"{r['decoder']}: {r['receptive_field_groups']}, {r['predicted_groups']}" for r in rows)
    worst = f"; Chop(R) against Full(): largest relative difference {max(exact):.0e}" if exact else ""
    return [
        Claim(
            "Every decoder has a finite temporal receptive field R: beyond it the influence is exactly zero, and "
            "truncation at D >= R gives the exact gradient.",
            "ours",
            every,
            fields + worst,
        ),
        Claim(
            "R follows from the architecture: the look-backs of the causal convolutions in series add up (in frames, "
            "or in whole groups where a norm mixes the frames of a group), in groups, rounded up.",
            "ours",
            predicted,
            f"measured R, predicted R: {pairs}",
        ),
    ]


def main(config: Config) -> None:
    print_claims([measure(config)])


if __name__ == "__main__":
    run_main(main, Config, __doc__)
