"""``chopgrad plan``: which strategy fits, on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from chopgrad import arguments
from chopgrad.planner import Prediction, fits, frontier, recommend
from chopgrad.planner import encoder as encoders
from chopgrad.planner import prediction as decoders
from chopgrad.planner.estimate import Estimator, encoder_estimator, estimator
from chopgrad.planner.remedies import Remedy, remedies
from chopgrad.planner.seconds import H200, Card
from chopgrad.units import bytes_of

GIB = 2**30
ANY = 1 << 62
"""Bytes: more than any card has."""


def run(options: argparse.Namespace) -> int:
    """0, or 2 for what cannot be predicted."""
    budgets = (
        bytes_of("--budget", options.budget),
        bytes_of("--host-budget", options.host_budget),
    )
    said = _say if sys.stderr.isatty() else lambda _: None
    try:
        size = arguments.size_of(options.size)
        found = _estimator(options, size, options.dtype)
        said("predicting ...")
        module: Any = encoders if options.encoder else decoders
        strategies = module.default_strategies(found.groups())
        checkpoint: Any = None if options.checkpoint == "none" else options.checkpoint
        predictions = found.of(strategies, checkpoint)
        best = recommend(predictions, budgets[0] or ANY, budgets[1]) if any(budgets) else None
        advice: list[Remedy] = []
        if any(budgets) and best is None:
            said("looking for what would fit ...")
            advice = list(
                remedies(
                    found, strategies, lambda rows: recommend(rows, budgets[0] or ANY, budgets[1]), checkpoint, size,
                    found.multiple(size), options.dtype, lambda size, dtype: _estimator(options, size, dtype),
                )
            )  # fmt: skip
            if advice and not advice[0].change:
                best = advice.pop(0).prediction
                predictions.append(best)
        said("")
    except ValueError as error:
        said("")
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = _shown(predictions, best, found.groups())
    if options.json:
        print(json.dumps(_as_json(options, predictions, shown, best, advice, budgets), indent=1))
    else:
        rows = predictions if options.all else shown
        print(_as_text(options, predictions, rows, best, advice, budgets))
    return 0


def _estimator(options: argparse.Namespace, size: tuple[int, int], dtype: str) -> Estimator:
    rates = arguments.rates_of(options.rates)
    common: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "subfolder": options.subfolder,
        "card": Card(*rates) if rates else H200,
    }
    if options.encoder:
        gradient: Any = options.encoder_gradient or "both"
        return encoder_estimator(options.vae, options.frames, *size, gradient=gradient, **common)
    return estimator(
        options.vae,
        options.frames,
        *size,
        loss=options.loss,
        frames_loss=options.frames_loss,
        trainable_decoder=options.trainable_decoder,
        **common,
    )


def _say(text: str) -> None:
    """One line on a terminal, gone when all is done."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _shown(predictions: list[Prediction], best: Prediction | None, groups: int) -> list[Prediction]:
    """The frontier; of one group, where all strategies are one, what is recommended."""
    if groups == 1:
        return [best or min(predictions, key=lambda p: (p.relative_seconds or 0, p.device_bytes))]
    found = frontier(predictions)
    return found if best is None or any(p is best for p in found) else [*found[:7], best]


def _label(prediction: Prediction) -> str:
    """The strategy (and the decoder's checkpoint) as written in code, without settings left at their default."""
    inside = f", checkpoint='{prediction.checkpoint}'" if prediction.checkpoint else ""
    return f"{prediction.strategy!r}{inside}"


def _short(prediction: Prediction) -> str:
    """The same for a narrow column."""
    words = _label(prediction).replace("=True", "")
    return words.replace(", checkpoint='", " + ").rstrip("'")


def _python(prediction: Prediction, encoder: bool) -> list[str]:
    """Two lines to paste."""
    part = "encoder" if encoder else "decoder"
    inside = prediction.checkpoint
    words = _label(dataclasses.replace(prediction, checkpoint=None))
    return [
        f"{part} = chopgrad.{part}_for(vae, checkpoint={inside!r})",
        f"strategy = chopgrad.{words}",
    ]


def _gradient(prediction: Prediction) -> str:
    return "exact" if prediction.distance is None else f"D = {prediction.distance}"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def _as_text(
    options: argparse.Namespace,
    predictions: list[Prediction],
    rows: list[Prediction],
    best: Prediction | None,
    advice: list[Remedy],
    budgets: tuple[int | None, int | None],
) -> str:
    table = [["strategy", "device GiB", "host GiB", "time", "gradient", *(["fits"] if any(budgets) else [])]]
    for p in rows:
        row = [_short(p), _gib(p.device_bytes), _gib(p.host_bytes), f"{p.relative_seconds:.2f}", _gradient(p)]
        if any(budgets):
            row.append("yes" if fits(p, budgets[0] or ANY, budgets[1]) else "")
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    part, maker = ("encoder", "what is made of the moments") if options.encoder else (
        "decoder", "the model that makes the latents")  # fmt: skip
    rest = len(predictions) - len(rows)
    lines = [
        f"Predicted for {options.vae}, {options.frames} frames of {options.size}, {_what(options)}:",
        "",
        *lines,
        "",
        *([f"{rest} more strategies take more of everything, or much more time: --all shows them."] if rest else []),
        f"device: peak with the {part}'s weights; time: relative to full back-propagation, on {_card(options)};",
        f"offload, recompute, pieces stand for =True; + frame for {part}_for(vae, checkpoint='frame').",
        "Left out: cuDNN workspaces, allocator fragmentation, the CUDA context, and",
        f"{maker}; PyTorch rounds pinned host memory up:",
        "to 6 % more than the column, and it keeps what it once took.",
        "",
    ]
    if best is not None:
        chosen = best
        host = f" and {_gib(best.host_bytes)} GiB on the host" if best.host_bytes else ""
        asked = options.budget or f"{options.host_budget} on the host"
        lines.append(f"For {asked}: {_label(best)}, {_gib(best.device_bytes)} GiB{host}.")
    elif any(budgets):
        chosen = min(predictions, key=lambda p: p.device_bytes)
        asked = " and ".join([*([options.budget] if options.budget else []),
                              *([f"{options.host_budget} on the host"] if options.host_budget else [])])  # fmt: skip
        lines.append(
            f"Nothing fits {asked}; the least on the device is {_label(chosen)} with {_gib(chosen.device_bytes)} GiB."
        )
        for change, p in advice:
            host = f", {_gib(p.host_bytes)} GiB on the host" if p.host_bytes else ""
            lines.append(f"- With {change} fits {_short(p)}: {_gib(p.device_bytes)} GiB{host}.")
        if not advice:
            lines.append("Nor does it with fewer frames, a quarter of the size or another dtype.")
    else:
        chosen = _default(rows)
        lines.append(f"Least on the device: {_label(chosen)}, {_gib(chosen.device_bytes)} GiB.")
    lines += [f"Its peak on the device is in {chosen.moment}.", "", *_python(chosen, options.encoder)]
    return "\n".join(lines)


def _default(rows: list[Prediction]) -> Prediction:
    """Of those shown the exact one that takes least on the device; of equal ones, the quickest."""
    exact = [p for p in rows if p.distance is None]
    least = min(p.device_bytes for p in exact)
    return min((p for p in exact if p.device_bytes <= 1.01 * least), key=lambda p: p.relative_seconds or 0)


def _what(options: argparse.Namespace) -> str:
    if options.encoder:
        gradient = options.encoder_gradient or "both"
        of = "parameters and video" if gradient == "both" else gradient
        return f"encoded, {options.dtype}, gradient of {of}"
    what = options.loss + (" on the whole video" if options.frames_loss == "whole" else "")
    return what + f", {options.dtype}" + (", trainable decoder" if options.trainable_decoder else "")


def _card(options: argparse.Namespace) -> str:
    return f"a card of {options.rates}" if options.rates else "an H200"


def _as_json(
    options: argparse.Namespace,
    predictions: list[Prediction],
    shown: list[Prediction],
    best: Prediction | None,
    advice: list[Remedy],
    budgets: tuple[int | None, int | None],
) -> dict[str, Any]:
    def row(p: Prediction) -> dict[str, Any]:
        fields = {k: v for k, v in dataclasses.asdict(p).items() if k != "strategy"}
        return {"strategy": _label(p), **fields, "python": _python(p, options.encoder)}

    rows = []
    for p in predictions:
        inside = fits(p, budgets[0] or ANY, budgets[1]) if any(budgets) else None
        rows.append({**row(p), "frontier": any(p is x for x in shown), "fits": inside})
    return {
        "settings": {k: v for k, v in vars(options).items() if k != "command"},
        "predictions": rows,
        "recommended": _label(best) if best else None,
        "python": _python(best, options.encoder) if best else None,
        "would_fit": [{"change": change, **row(p)} for change, p in advice],
    }
