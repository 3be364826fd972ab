"""The command line's arguments, read before PyTorch and diffusers are imported."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import chopgrad
from chopgrad.published import ARCHITECTURES


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="chopgrad", description="Pixel losses through causal-cache video decoders.")
    found.add_argument("--version", action="version", version=f"chopgrad {chopgrad.__version__}")
    commands = found.add_subparsers(required=True, metavar="command", dest="command")
    _add_plan(commands.add_parser("plan", help="predict memory and time of every strategy, without GPU and weights"))
    says = "check frames, gradients, truncation and upstream checkpointing of a VAE as it is loaded"
    _add_audit(commands.add_parser("audit", help=says))
    return found


def _add_plan(command: argparse.ArgumentParser) -> None:
    vaes = ", ".join(ARCHITECTURES)
    command.add_argument("--vae", required=True, help=f"{vaes}, a folder with a config.json, or a hub id")
    command.add_argument("--subfolder", help="where the VAE lies inside a pipeline's folder or hub id, usually vae")
    command.add_argument("--frames", type=int, required=True, help="frames of the video")
    command.add_argument("--size", required=True, metavar="HxW", help="height and width in pixels, such as 720x1280")
    command.add_argument("--loss", choices=["mse", "lpips"], default="mse")
    sees = "whether the loss sees one frame group at a time (frame_loss) or the whole video (decode)"
    command.add_argument("--frames-loss", choices=["streamed", "whole"], default="streamed", help=sees)
    command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    command.add_argument("--budget", help="device memory to fit into, such as 24GiB")
    command.add_argument("--host-budget", help="host memory to fit into as well, such as 64GiB")
    rates = "TFLOP/s, GB/s of its memory and GB/s to the host, for times (default: an H200's, 350,4000,51)"
    command.add_argument("--rates", metavar="RATES", help=rates)
    command.add_argument("--trainable-decoder", action="store_true", help="gradients of decoder parameters too")
    command.add_argument("--encoder", action="store_true", help="encode the video, with a mean of the moments as loss")
    of = "what the encoder's gradient is wanted of (default: both, which takes most)"
    command.add_argument("--encoder-gradient", choices=["both", "parameters", "video"], help=of)
    inside = "recomputed inside a group (default: best, nothing and, where pieces are walked, also frame)"
    command.add_argument(
        "--checkpoint", choices=["best", "none", "frame", "residual", "block"], default="best", help=inside
    )
    command.add_argument("--all", action="store_true", help="every strategy, also those that another is better than")
    command.add_argument("--json", action="store_true", help="machine-readable output")


def _add_audit(command: argparse.ArgumentParser) -> None:
    vaes = ", ".join(ARCHITECTURES)
    command.add_argument("--vae", required=True, help=f"a folder or hub id with weights; or, with random ones, {vaes}")
    command.add_argument("--subfolder", help="where the VAE lies inside a pipeline's folder or hub id, usually vae")
    command.add_argument("--clip", help="a video file: its first frames, cut in the middle, are encoded and restored")
    command.add_argument("--frames", type=int, default=17, help="how many of its frames (default 17)")
    command.add_argument("--size", default="64x64", metavar="HxW", help="of the cut, in pixels (default 64x64)")
    command.add_argument("--loss", choices=["l1", "mse"], default="mse")
    how = "set on the VAE before anything else, such as use_framewise_decoding=true; repeatable"
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=how)
    command.add_argument("--call", action="append", default=[], metavar="NAME", help="the same, such as enable_tiling")
    command.add_argument("--json", action="store_true", help="machine-readable output")


def size_of(text: str, example: str = "720x1280") -> tuple[int, int]:
    """(height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as {example}; got '{text}'.")
    return int(match[1]), int(match[2])


def rates_of(text: str | None) -> tuple[float, float, float] | None:
    """FLOP/s, bytes/s of the memory, bytes/s to the host."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text)
    if not match or not all(float(x) for x in match.groups()):
        raise ValueError(f"--rates must be TFLOP/s, GB/s and GB/s to the host, such as 350,4000,51; got '{text}'.")
    flops, memory, host = map(float, match.groups())
    return flops * 1e12, memory * 1e9, host * 1e9


def check_vae(vae: str) -> None:
    """Raises:
    ValueError: it is none of the names, no folder, and cannot be a hub id.
    """
    if vae not in ARCHITECTURES and not Path(vae).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", vae):
        raise ValueError(
            f"No config was found for '{vae}': pass {', '.join(ARCHITECTURES)}, a folder with a config.json, or a hub "
            "id (owner/name)."
        )


def check_encoder(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: options that do not go together.
    """
    if options.encoder and (options.trainable_decoder or options.loss != "mse" or options.frames_loss != "streamed"):
        raise ValueError(
            "--encoder has a mean of the moments as its loss, and no decoder: leave out --loss, --frames-loss and "
            "--trainable-decoder."
        )
    if options.encoder_gradient and not options.encoder:
        raise ValueError("--encoder-gradient goes with --encoder.")
