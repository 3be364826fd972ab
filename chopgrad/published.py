"""The published architectures by name; and nothing that must be imported for it."""

from __future__ import annotations

from typing import Any

_WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", {}),
    "wan2.2": ("AutoencoderKLWan", _WAN22),
    "qwen-image": ("AutoencoderKLQwenImage", {"dim_mult": [1, 2, 4, 4]}),  # diffusers 0.36 fails on its own default
    "cogvideox": ("AutoencoderKLCogVideoX", {}),
}
"""Class, and what differs from its defaults."""
