"""The table of video VAEs in ``docs/decoders.md``: ``python -m report.docs.classes`` (some minutes).

Each class with the depth of its published architecture, few channels and random weights: what counts here (groups,
receptive field, whether upstream's checkpointing gives the right gradient) depends on neither width nor weights.
"""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models import autoencoders
from torch import nn

from chopgrad import DECODERS, CausalDecoder, decoder_for
from chopgrad.audit import audit
from chopgrad.decoders.unsupported import UNSUPPORTED
from suite.command_line import run_main
from suite.records import ROOT
from suite.tables import markdown_table

PAGE = ROOT / "docs" / "decoders.md"
BLOCK = re.compile(r"(<!-- classes -->\n\n)(?:.*\n)*?(?=\n*The table is measured)")


@dataclass(frozen=True)
class Row:
    """A class, or one form of it.

    Args:
        models: that come with it.
        narrow: settings that make it small, and as deep as the published one.
        in_time: what the recurrence carries.
        attributes: set on the model: windows that a user has to ask for.
        call: made on it, for the same.
    """

    name: str
    models: str
    narrow: dict[str, Any] = field(default_factory=dict)
    in_time: str = "cache"
    attributes: dict[str, Any] = field(default_factory=dict)
    call: str = ""


_FOUR = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
ROWS = [
    Row("AutoencoderKLWan", "Wan 2.1", {"base_dim": 4}),
    Row(
        "AutoencoderKLWan",
        "Wan 2.2 TI2V-5B",
        {
            "base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "is_residual": True, "in_channels": 12,
            "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, **_FOUR,
        },
    ),
    Row("AutoencoderKLQwenImage", "Qwen-Image", {"base_dim": 4, "dim_mult": [1, 2, 4, 4]}),
    Row(
        "AutoencoderKLQwenImage21",
        "Qwen-Image 2.1",
        {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, **_FOUR},
        "one image",
    ),
    Row("AutoencoderKLCogVideoX", "CogVideoX", {"block_out_channels": (8,) * 4, "norm_num_groups": 2}),
    Row("AutoencoderKLMagvit", "EasyAnimate", {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2}),
    Row("AutoencoderKLKVAEVideo", "Kandinsky 5", {"ch": 32, "ch_mult": (1, 1, 1, 1)}),
    Row(
        "Kandinsky6SRVAE",
        "Kandinsky 6 super-resolution",
        {"encoder_block_out_channels": (4, 4, 4, 8), "decoder_block_out_channels": (4, 4, 8, 8)},
    ),
    Row(
        "AutoencoderKLMochi",
        "Mochi",
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
    ),
    Row("AutoencoderVidTok", "VidTok", {"ch": 4}),
    Row(
        "AutoencoderKLHunyuanVideo",
        "HunyuanVideo",
        {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2},
        "windows",
    ),
    Row(
        "AutoencoderKLLTXVideo",
        "LTX-Video",
        {"block_out_channels": (8, 8, 16, 16), "decoder_block_out_channels": (8, 8, 16, 16)},
        "windows",
        {"use_framewise_decoding": True},
    ),
    Row(
        "AutoencoderKLLTX2Video",
        "LTX-2",
        {"block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32), "latent_channels": 8,
            "temporal_compression_ratio": 8, "spatial_compression_ratio": 32},
        "windows",
        {"use_framewise_decoding": True},
    ),
    Row(
        "AutoencoderKLMiniMaxH3",
        "MiniMax H3",
        {
            "block_out_channels": (4,) * 6, "norm_num_groups": 2, "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
        },
        "windows",
    ),
    Row(
        "AutoencoderKLAllegro",
        "Allegro",
        {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2},
        "windows",
        {"kernel": (24, 64, 64), "stride": (16, 32, 32)},
        "enable_tiling",
    ),
    Row("AutoencoderKLHunyuanVideo15", "HunyuanVideo 1.5"),
    Row("AutoencoderKLCosmos", "Cosmos"),
    Row("AutoencoderKLTemporalDecoder", "Stable Video Diffusion"),
]  # fmt: skip
OTHERS = {
    "images": (
        "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLKVAE", "AutoencoderRAE", "AutoencoderTiny",
        "ConsistencyDecoderVAE", "VQModel",
    ),
    "sound": (
        "AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck",
        "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE", "MMAudioVocoder",
        "MiniMaxMusic3Vocoder",
    ),
    "proteins": ("RFD4ProteinaAutoencoder",),
    "a diffusion model in place of a decoder": ("LTX2VideoDiffusionDecoderModel",),
}  # fmt: skip
"""What diffusers calls an autoencoder and is none of videos."""
HEADER = (
    "class", "models", "in time", "latents in a group", "frames of it", "receptive field, groups", "clamp",
    "upstream checkpointing",
)  # fmt: skip


def classes() -> set[str]:
    """The names of all autoencoders in the installed diffusers."""
    found = vars(autoencoders).values()
    return {cls.__name__ for cls in found if inspect.isclass(cls) and issubclass(cls, nn.Module)}


def unlisted() -> set[str]:
    """Autoencoders of which neither the table nor ``OTHERS`` knows."""
    return classes() - {row.name for row in ROWS} - {name for names in OTHERS.values() for name in names}


def built(row: Row) -> Any:
    torch.manual_seed(0)
    vae = getattr(diffusers, row.name)(**row.narrow).double().eval().requires_grad_(False)
    for name, value in row.attributes.items():
        setattr(vae, name, value)
    if row.call:
        getattr(vae, row.call)()
    return vae


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    if row.name in UNSUPPORTED:
        return (f"`{row.name}`", row.models, "nothing: not supported", *[""] * 5)
    vae = built(row)
    decoder = decoder_for(vae)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {x.name: x for x in audit(vae, distances=(), size=2, most_latents=64)}
    reach = found["temporal receptive field, groups"]
    latents, frames = sizes(decoder)
    z = 100 * torch.randn(1, decoder.latent_channels, *_shortest(decoder), dtype=torch.float64)
    with torch.no_grad():
        clamps = bool((decoder.own_decode(decoder.denormalize(z)).abs() <= 1).all())
    return (
        f"`{row.name}`",
        row.models,
        row.in_time + asked(row),
        latents,
        frames,
        "" if row.in_time == "one image" else reached(reach),
        "yes" if clamps else "no",
        upstream(found["upstream checkpointing"]),
    )


def _shortest(decoder: CausalDecoder) -> tuple[int, int, int]:
    """Latents, height and width of the least that it decodes."""
    count = next(n for n in range(1, 200) if _groups(decoder, n))
    return count, decoder.trial_size, decoder.trial_size


def asked(row: Row) -> str:
    """What turns the windows on, where they are off at first."""
    calls = [f"`vae.{row.call}()`"] * bool(row.call)
    calls += [f"`vae.{name} = {value}`" for name, value in row.attributes.items() if value is True]
    return f", after {' and '.join(calls)}" if calls else ""


def sizes(decoder: CausalDecoder) -> tuple[str, str]:
    """Latents and frames of the first group and of later ones."""
    groups: list[Any] = []
    for count in range(1, 200):
        groups = _groups(decoder, count)
        if len(groups) >= 6:
            break
    groups = groups or _groups(decoder, 1)  # of images
    taken = [g.latents.stop - g.latents.start for g in groups[:4]]
    given = [g.frame_count for g in groups[:4]]
    first, second = (f"{a[0]}" if a[0] == a[-1] else f"{a[0]}, then {a[-1]}" for a in (taken, given))
    return first, second


def _groups(decoder: CausalDecoder, count: int) -> list[Any]:
    try:
        return decoder.frame_groups(count)
    except ValueError:
        return []


def reached(found: Any) -> str:
    return f"{found.value:.0f}" if "exact" in found.sentence else f"more than {found.value:.0f}"


def upstream(found: Any) -> str:
    if found.verdict == "BROKEN":
        return "**silently wrong**"
    if found.verdict == "right":
        return "right"
    if "does not support" in found.sentence or "There is none" in found.sentence:
        return "none"
    return "does nothing" if "does nothing" in found.sentence else "raises"


@dataclass
class Config:
    """Settings of the table."""

    check: bool = False
    """Write nothing; end with status 1 where the table differs."""


def main(config: Config) -> None:
    if unlisted():
        raise ValueError(f"This diffusers has autoencoders that the table lacks: {', '.join(sorted(unlisted()))}.")
    missing = set(DECODERS) - {row.name for row in ROWS}
    if missing:
        raise ValueError(f"The table lacks {', '.join(sorted(missing))}.")
    lines = []
    for number, row in enumerate(ROWS):
        print(f"{number + 1} of {len(ROWS)}: {row.name}", flush=True)
        lines.append(cells(row))
    before = PAGE.read_text()
    reasons = "\n".join(f"- `{name}` is not supported: {why}" for name, why in sorted(UNSUPPORTED.items()))
    after = BLOCK.sub(lambda found: f"{found[1]}{markdown_table(HEADER, lines)}\n\n{reasons}\n", before)
    if config.check and after != before:
        raise ValueError("The table differs: run python -m report.docs.classes.")
    PAGE.write_text(after)
    print(f"Written: {PAGE.name}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
