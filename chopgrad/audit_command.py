"""``chopgrad audit``: a VAE and its weights looked at, on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn import functional as F

from chopgrad.arguments import size_of
from chopgrad.audit import as_rows, as_table, audit, is_broken, is_refused
from chopgrad.clip import read_clip
from chopgrad.planner.architectures import build, config_of
from chopgrad.published import ARCHITECTURES

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


def run(options: argparse.Namespace) -> int:
    """0: nothing is broken; 1: something is; 2: bad input, or a VAE that chopgrad does not take as it is."""
    try:
        height, width = size_of(options.size, "64x64")
        video = None
        if options.clip is not None:
            video = read_clip(options.clip, options.frames, height, width)
        vae = prepared(load(options.vae, options.subfolder), options.settings, options.call)
        said = _say if sys.stderr.isatty() else lambda _: None
        found = audit(vae, video, LOSSES[options.loss], said=said)
        said("")
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "command"}
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
