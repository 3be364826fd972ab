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

from chopgrad.audit import as_rows, as_table, audit, is_broken, is_refused
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
    how = "set on the VAE before anything else, such as use_framewise_decoding=true; repeatable"
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=how)
    command.add_argument("--call", action="append", default=[], metavar="NAME", help="the same, such as enable_tiling")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0: nothing is broken; 1: something is; 2: bad input, or a VAE that chopgrad does not take as it is."""
    try:
        match = re.fullmatch(r"(\d+)x(\d+)", options.size)
        if not match:
            raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 64x64; got '{options.size}'.")
        video = None
        if options.clip is not None:
            video = read_clip(options.clip, options.frames, int(match[1]), int(match[2]))
        vae = prepared(load(options.vae, options.subfolder), options.settings, options.call)
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
        ends = "Refused as it is: see --set and --call." if is_refused(found) else "Nothing is broken."
        print(f"\nBroken: {', '.join(broken)}." if broken else f"\n{ends}")
    return 1 if is_broken(found) else 2 if is_refused(found) else 0


def prepared(vae: Any, settings: list[str], calls: list[str]) -> Any:
    """With windows, tiles or whatever a user asks for."""
    for name in calls:
        if not callable(getattr(vae, name, None)):
            raise ValueError(f"--call {name}: {type(vae).__name__} has no such method.")
        getattr(vae, name)()
    for text in settings:
        name, _, value = text.partition("=")
        if not hasattr(vae, name):
            raise ValueError(f"--set {text}: {type(vae).__name__} has no '{name}'.")
        try:
            setattr(vae, name, json.loads(value))
        except json.JSONDecodeError:
            raise ValueError(f"--set {text}: the value must be JSON, such as true or 16.") from None
    return vae


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
