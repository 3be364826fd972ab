"""Small films for tests, written with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np

GREEN, BLUE = (0, 255, 0), (0, 0, 255)


def picture(k, height=32, width=48):
    """Frame k: grey of a level of its own, the top left corner green and the top right one blue."""
    found = np.full((height, width, 3), 4 * k % 256, np.uint8)
    found[: height // 4, : width // 4], found[: height // 4, -(width // 4) :] = GREEN, BLUE
    return found


def write_film(path, codec="libx264", pix_fmt="yuv420p", frames=40, size=(32, 48), times=None, options=None):
    """Frames of ``picture``, at 1/25 s or at so many milliseconds; H.264 with B-frames, a keyframe each 10 frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if options is None:
        options = {"g": "10", "bf": "2", "crf": "8"} if codec == "libx264" else {}
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000 if times else 25)
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(k, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = times[k] if times else k, stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_sound(path):
    """A film without pictures."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    return path


def show_by(path, a, b, c, d):
    """Write into an .mp4 how to show it: a stored pixel at (x, y) lies at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    # The header of a track: type, version, times and number, two reserved words, layer and volume, then the matrix.
    begin = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    data[begin : begin + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut_short(path, share=0.6):
    """The file as an interrupted copy leaves it."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path
