"""``chopgrad audit``: a VAE and its weights looked at, on the command line."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn import functional as F

from chopgrad.audit import as_rows, as_table, audit, is_broken
from chopgrad.clip import read_clip
from chopgrad.planner.architectures import ARCHITECTURES, build, config_of

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "audit", help="check frames, gradients, truncation and upstream checkpointing of a VAE as it is loaded"
    )
    vaes = ", ".join(ARCHITECTURES)
    command.add_argument("--vae", required=True, help=f"a folder or hub id with weights; or, with random ones, {vaes}")
    command.add_argument("--subfolder", help="where the VAE lies inside a pipeline's folder or hub id, usually vae")
    command.add_argument("--clip", help="a video file: its first frames, cut in the middle, are encoded and restored")
    command.add_argument("--frames", type=int, default=17, help="how many of its frames (default 17)")
    command.add_argument("--size", default="64x64", metavar="HxW", help="of the cut, in pixels (default 64x64)")
    command.add_argument("--loss", choices=sorted(LOSSES), default="mse")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0: nothing is broken; 1: something is; 2: bad input."""
    try:
        match = re.fullmatch(r"(\d+)x(\d+)", options.size)
        if not match:
            raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 64x64; got '{options.size}'.")
        video = None
        if options.clip is not None:
            video = read_clip(options.clip, options.frames, int(match[1]), int(match[2]))
        vae = load(options.vae, options.subfolder)
        said = _say if sys.stderr.isatty() else lambda _: None
        found = audit(vae, video, LOSSES[options.loss], said=said)
        said("")
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "run"}
        print(json.dumps({"settings": settings, "findings": as_rows(found), "broken": is_broken(found)}, indent=1))
    else:
        weights = "random weights" if options.vae in ARCHITECTURES else "its weights"
        print(f"{type(vae).__name__} ({options.vae}, {weights}), {options.clip or 'random latents'}, {options.loss}:\n")
        print(as_table(found))
        broken = [x.name for x in found if x.verdict == "BROKEN"]
        print(f"\nBroken: {', '.join(broken)}." if broken else "\nNothing is broken.")
    return int(is_broken(found))


def load(vae: str, subfolder: str | None) -> nn.Module:
    """With weights from a folder or the hub (safetensors only), or a published architecture with random ones."""
    if vae in ARCHITECTURES:
        return build(vae, torch.float32, None)
    name = config_of(vae, subfolder).get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None or not issubclass(cls, nn.Module):
        raise ValueError(f"'{vae}' is a {name or 'model of unknown class'}, which this diffusers does not have.")
    return cls.from_pretrained(vae, subfolder=subfolder, use_safetensors=True)


def _say(text: str) -> None:
    """One line on a terminal, gone when all is done."""
    print(f"\r\x1b[K{text + ' ...' if text else ''}", end="", file=sys.stderr, flush=True)
