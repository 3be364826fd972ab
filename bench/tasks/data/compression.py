"""Lossy compression as a degradation: real codecs, in memory."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# Ranges of the quantiser. RealBasicVSR draws bit rates instead; a bit rate means something else at every size of
# picture, and clips have every size here.
QUANTISERS = {"libx264": (18, 32), "mpeg4": (2, 10)}


def compress_video(video: Tensor, codec: str, quantiser: int) -> Tensor:
    """Encode and decode [3, frames, H, W] in [-1, 1] at a constant quantiser: ``libx264`` or ``mpeg4`` (part 2).

    At a constant rate factor x264 gave another result at every call here (its macroblock tree with assembler code);
    at a constant quantiser, with one thread and ``cpu-independent``, the same input gives the same output.

    Raises:
        ValueError: the codec is not one of these.
    """
    if codec not in QUANTISERS:
        raise ValueError(f"Unknown codec '{codec}': pass one of {', '.join(QUANTISERS)}.")
    height, width = video.shape[2:]
    even = F.pad(video, (0, width % 2, 0, height % 2), mode="replicate")  # chroma has half the resolution
    options = (
        {"qp": str(quantiser), "preset": "medium", "threads": "1", "x264-params": "cpu-independent=1"}
        if codec == "libx264"
        else {"qmin": str(quantiser), "qmax": str(quantiser), "threads": "1"}
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width, stream.pix_fmt = even.shape[2], even.shape[3], "yuv420p"
        for picture in _to_bytes(even):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as written:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)])
    if len(decoded) != video.shape[1]:
        raise RuntimeError(f"{codec} returned {len(decoded)} of {video.shape[1]} frames.")
    return _from_bytes(decoded)[..., :height, :width]


def compress_frames(video: Tensor, quality: int) -> Tensor:
    """JPEG, each frame of [3, frames, H, W] on its own."""
    pictures = []
    for picture in _to_bytes(video):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        pictures.append(np.asarray(Image.open(buffer).convert("RGB")))
    return _from_bytes(np.stack(pictures))


def _to_bytes(video: Tensor) -> np.ndarray:
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 3, 0).numpy())


def _from_bytes(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
