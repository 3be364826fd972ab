"""Video VAEs whose decode has no recurrence in time to use, and what saves memory in its place."""

from __future__ import annotations

UNSUPPORTED: dict[str, str] = {
    "AutoencoderKLCosmos": (
        "its decoder attends over all frames before it, so that all are decoded at once. vae.enable_gradient_"
        "checkpointing() and shorter videos save memory with ordinary back-propagation; enable_tiling() and "
        "use_framewise_decoding have no effect in diffusers."
    ),
    "AutoencoderKLHunyuanVideo15": (
        "its middle block attends over all frames before it and nothing is cached, so that all are decoded at once. "
        "vae.enable_gradient_checkpointing(), vae.enable_tiling() (tiles in space, blended) and shorter videos save "
        "memory with ordinary back-propagation."
    ),
    "AutoencoderKLTemporalDecoder": (
        "it decodes the frames that it is given at once, and looks both ways in time. Pass few frames per call, as the "
        "pipelines' decode_chunk_size does: calls do not depend on each other, so call backward() after each; "
        "vae.enable_gradient_checkpointing() saves memory within one."
    ),
}
"""By class name, why, and what does help."""
