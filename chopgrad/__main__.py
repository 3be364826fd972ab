"""``chopgrad plan``: which strategy fits, on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys

import torch

import chopgrad
from chopgrad import audit_command
from chopgrad.planner import ARCHITECTURES, Prediction, plan, plan_encoder, recommend

GIB = 2**30
UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if hasattr(options, "run"):
        return options.run(options)
    try:
        height, width = _size(options.size)
        budget = _bytes("--budget", options.budget)
        host_budget = _bytes("--host-budget", options.host_budget)
        predictions = _predictions(options, height, width)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = recommend(predictions, budget, host_budget) if budget else None
    if options.json:
        print(json.dumps(_as_json(options, predictions, best), indent=1))
    else:
        print(_as_text(options, predictions, best))
    return 0


def _predictions(options: argparse.Namespace, height: int, width: int) -> list[Prediction]:
    settings = {
        "dtype": getattr(torch, options.dtype),
        "subfolder": options.subfolder,
        "checkpoint": None if options.checkpoint == "none" else options.checkpoint,
        "progress": _show if sys.stderr.isatty() else None,
    }
    if options.encoder:
        if options.trainable_decoder or options.loss != "mse" or options.frames_loss != "streamed":
            raise ValueError(
                "--encoder has a mean of the moments as its loss, and no decoder: leave out --loss, --frames-loss and "
                "--trainable-decoder."
            )
        return plan_encoder(
            options.vae, options.frames, height, width, gradient=options.encoder_gradient or "both", **settings
        )
    if options.encoder_gradient:
        raise ValueError("--encoder-gradient goes with --encoder.")
    return plan(
        options.vae,
        options.frames,
        height,
        width,
        loss=options.loss,
        frames_loss=options.frames_loss,
        trainable_decoder=options.trainable_decoder,
        **settings,
    )


def _show(done: int, total: int) -> None:
    """One line on a terminal, gone when all is done."""
    text = f"predicting {done + 1} of {total} ..." if done < total else ""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chopgrad", description="Pixel losses through causal-cache video decoders.")
    parser.add_argument("--version", action="version", version=f"chopgrad {chopgrad.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("plan", help="predict memory and compute of every strategy, without GPU and weights")
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
    command.add_argument("--trainable-decoder", action="store_true", help="gradients of decoder parameters too")
    command.add_argument("--encoder", action="store_true", help="encode the video, with a mean of the moments as loss")
    of = "what the encoder's gradient is wanted of (default: both, which takes most)"
    command.add_argument("--encoder-gradient", choices=["both", "parameters", "video"], help=of)
    inside = "recomputed inside a group (default: best, nothing and, where pieces are walked, also frame)"
    command.add_argument(
        "--checkpoint", choices=["best", "none", "frame", "residual", "block"], default="best", help=inside
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    audit_command.add_to(commands)
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 720x1280; got '{text}'.")
    return int(match[1]), int(match[2])


def _bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if not match or match[2].upper() not in UNITS:
        raise ValueError(f"{option} must be a number with a unit, such as 24GiB; got '{text}'.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _label(prediction: Prediction) -> str:
    """The strategy (and the decoder's checkpoint) as written in code, without settings left at their default."""
    strategy = prediction.strategy
    changed = [f.name for f in dataclasses.fields(strategy) if getattr(strategy, f.name) != f.default]
    words = f"{type(strategy).__name__}({', '.join(f'{name}={getattr(strategy, name)}' for name in changed)})"
    return words + (f", checkpoint='{prediction.checkpoint}'" if prediction.checkpoint else "")


def _as_text(options: argparse.Namespace, predictions: list[Prediction], best: Prediction | None) -> str:
    rows = [["strategy", "device GiB", "host GiB", "compute", "gradient"]]
    for p in predictions:
        sizes = [f"{p.device_bytes / GIB:.1f}", f"{p.host_bytes / GIB:.1f}", f"{p.relative_compute:.2f}"]
        rows.append([_label(p), *sizes, "exact" if p.distance is None else f"truncated at {p.distance}"])
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    part, maker = "decoder", "the model that makes the latents"
    what = options.loss + (" on the whole video" if options.frames_loss == "whole" else "")
    what += f", {options.dtype}" + (", trainable decoder" if options.trainable_decoder else "")
    if options.encoder:
        part, maker = "encoder", "what is made of the moments"
        gradient = options.encoder_gradient or "both"
        what = f"encoded, {options.dtype}, gradient of {'parameters and video' if gradient == 'both' else gradient}"
    lines = [
        f"Predicted for {options.vae}, {options.frames} frames of {options.size}, {what}:",
        "",
        *lines,
        "",
        f"device: peak with the {part}'s weights; compute: passes relative to full back-propagation;",
        f"checkpoint: of {part}_for(vae, checkpoint=...).",
        f"Left out: cuDNN workspaces, allocator fragmentation, the CUDA context, and {maker};",
        "PyTorch rounds pinned host memory up: to 6 % more than the column, and it keeps what it once took.",
    ]
    if best is not None:
        host = f" and {best.host_bytes / GIB:.1f} GiB on the host" if best.host_bytes else ""
        lines += ["", f"For {options.budget}: {_label(best)}, {best.device_bytes / GIB:.1f} GiB{host}."]
    elif options.budget:
        least = min(predictions, key=lambda p: p.device_bytes)
        need = f"{least.device_bytes / GIB:.1f} GiB"
        budgets = options.budget + (f" and {options.host_budget} on the host" if options.host_budget else "")
        lines += ["", f"Nothing fits {budgets}; the least on the device is {_label(least)} with {need}."]
    return "\n".join(lines)


def _as_json(options: argparse.Namespace, predictions: list[Prediction], best: Prediction | None) -> dict:
    rows = []
    for p in predictions:
        row = {k: v for k, v in dataclasses.asdict(p).items() if k != "strategy"}
        rows.append({"strategy": _label(p), **row})
    return {"settings": vars(options), "predictions": rows, "recommended": _label(best) if best else None}


if __name__ == "__main__":
    sys.exit(main())
