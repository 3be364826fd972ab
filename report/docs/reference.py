"""The API reference from the docstrings: ``python -m report.docs.reference [--check]`` writes ``docs/api.md``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ForwardRef

import chopgrad
from chopgrad import audit, memory, planner, recurrence, testing
from suite.command_line import run_main
from suite.records import ROOT

PAGE = ROOT / "docs" / "api.md"
PARTS: dict[str, list[Any]] = {
    "Decoding": [chopgrad.decode, chopgrad.patch, chopgrad.PatchHandle],
    "The loss, group by group": [chopgrad.frame_loss, chopgrad.framewise],
    "Strategies": [chopgrad.Full, chopgrad.Exact, chopgrad.Chop, chopgrad.Sampled],
    "Decoders": [chopgrad.decoder_for, chopgrad.register_decoder, chopgrad.CausalDecoder, chopgrad.FrameGroup],
    "What decoders and encoders share": [recurrence.Recurrence],
    "Encoding": [
        chopgrad.encode,
        chopgrad.encoder_for,
        chopgrad.register_encoder,
        chopgrad.CausalEncoder,
        chopgrad.LatentGroup,
    ],
    "Memory": [
        planner.plan,
        planner.plan_encoder,
        planner.estimator,
        planner.encoder_estimator,
        planner.recommend,
        planner.frontier,
        planner.profile,
        planner.need,
        planner.seconds,
        planner.Prediction,
        planner.Estimator,
        planner.Profile,
        planner.GroupProfile,
        planner.PieceProfile,
        planner.Surroundings,
        planner.Need,
        planner.Card,
        planner.default_strategies,
        memory.PeakMemory,
    ],
    "Conformance": [testing.check_decoder, testing.check_encoder, testing.ConformanceError, audit.audit, audit.Finding],
}
WITH_METHODS = (
    chopgrad.PatchHandle,
    chopgrad.CausalDecoder,
    chopgrad.CausalEncoder,
    recurrence.Recurrence,
    memory.PeakMemory,
)
RETURNED = (chopgrad.PatchHandle,)  # users do not make one
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Cost):(.*)")
NAMED = ("Args", "Attributes", "Raises")  # sections of "name: what it is"


def page() -> str:
    """The whole reference as Markdown."""
    lines = [
        "# API reference",
        "",
        "Written by `python -m report.docs.reference` from the docstrings; do not edit it by hand.",
        "",
    ]
    for title, objects in PARTS.items():
        names = ", ".join(f"[{thing.__name__}](#{thing.__name__.lower()})" for thing in objects)
        lines += [f"- {title}: {names}"]
    for title, objects in PARTS.items():
        lines += ["", f"## {title}"]
        for thing in objects:
            lines += ["", f"### {thing.__name__}", "", *_described(thing, f"{_module(thing)}.{thing.__name__}")]
            for name, method in _methods(thing):
                lines += ["", f"#### {thing.__name__}.{name}", "", *_described(method, name)]
    return "\n".join(lines) + "\n"


def _module(thing: Any) -> str:
    """Where users import it from."""
    packages = (package for package in (chopgrad, planner) if thing.__name__ in package.__all__)
    return next((package.__name__ for package in packages), thing.__module__)


def _methods(thing: Any) -> list[tuple[str, Any]]:
    """Public methods and properties of a class that users call or write."""
    if thing not in WITH_METHODS:
        return []
    public = ((name, value) for name, value in vars(thing).items() if not name.startswith("_"))
    return [(name, value) for name, value in public if inspect.isfunction(value) or isinstance(value, property)]


def _described(thing: Any, name: str) -> list[str]:
    doc = markdown(inspect.getdoc(thing) or "")
    if thing in RETURNED or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return doc
    if isinstance(thing, property):
        return doc
    return ["```python", signature(thing, name), "```", "", *doc]


def signature(thing: Callable[..., Any], name: str) -> str:
    """``name(parameters) -> result``, as it is written in the source; on several lines where one is too short."""
    words, star = [], False
    found = inspect.signature(thing)
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        word = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        if parameter.annotation is not parameter.empty:
            word += f": {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            word += f" = {parameter.default!r}"
        words.append(word)
    plain = inspect.isclass(thing) or found.return_annotation is found.empty
    result = "" if plain else f" -> {_type(found.return_annotation)}"
    line = f"{name}({', '.join(words)}){result}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])


def _type(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):  # of a NamedTuple
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def markdown(doc: str) -> list[str]:
    """A docstring's paragraphs and sections; ``code`` becomes `code`, and named entries become lists."""
    lines: list[str] = []
    section = ""
    for line in doc.replace("``", "`").splitlines():
        match = SECTION.fullmatch(line)
        if match:
            section = match[1]
            lines += [f"**{section}**:{match[2]}", ""] if section in NAMED else [f"**{section}**:{match[2]}"]
        elif section in NAMED and re.match(r" {4}\S", line):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon else f"  {line.strip()}")
        else:
            section = section if line.startswith(" ") or not line else ""
            lines.append(("  " if section in NAMED and line else "") + line.strip())
    return lines


@dataclass
class Config:
    """Settings of the reference."""

    check: bool = False
    """Write nothing; only say whether docs/api.md is what the docstrings give."""


def main(config: Config) -> None:
    text = page()
    if not config.check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        raise ValueError("docs/api.md differs from the docstrings: run python -m report.docs.reference.")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
