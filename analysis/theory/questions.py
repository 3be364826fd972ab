"""The questions of the theory, each a section of ``results/theory.md``: its statements and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One section.

    Args:
        heading: the question; links lead to it, so it should stay.
        statements: how the statements of its claims begin, in the order of its rows.
        figures: beginnings of the names of its figures.
    """

    heading: str
    statements: tuple[str, ...]
    figures: tuple[str, ...] = ()

    def place(self, statement: str) -> int | None:
        """Of a statement among the rows; None where it is no answer to this question."""
        return next((k for k, start in enumerate(self.statements) if statement.startswith(start)), None)


QUESTIONS = (
    Question(
        "Does influence decay with temporal distance?",
        (
            "Temporal locality: there are C, alpha > 0",
            "Influence decays exponentially with temporal distance",
            "Without temporal locality no distance",
        ),
        ("temporal_locality",),
    ),
    Question(
        "Where does temporal locality come from?",
        ("Training creates temporal locality", "Temporal locality comes about"),
    ),
    Question(
        "How far does a decoder look back?",
        ("Every decoder has a finite temporal receptive field", "R follows from the architecture"),
    ),
    Question(
        "Do the bounds of the truncation error hold?",
        (
            "The truncation error is at most the sum",
            "The truncation error is at most the full sum",
            "The truncation error is at most the geometric tail",
            "The geometric tail is the best bound",
        ),
        ("error_bound",),
    ),
    Question(
        "Is the rule for D enough?",
        (
            "D >= log(C/eps)/alpha is enough for tolerance eps",
            "Once it has G in it, the paper's rule",
            "A decay rate is not enough",
            "The distance is better chosen by measuring",
        ),
    ),
    Question(
        "Does the residual decide the bias?",
        ("At D = 1 the gradient of the latents keeps a cosine", "The residual decides the bias"),
        ("residuals",),
    ),
    Question(
        "Is the backbone gradient's error one of magnitude?",
        (
            "At small distances the error of the backbone's gradient is large",
            "Yet its cosine with the full gradient is high",
            "The error is one of magnitude",
            "The optimiser rescales the error away",
            "Averaging over data removes the truncation error",
        ),
        ("backbone_gradient",),
    ),
    Question(
        "Is the gradient local in space?",
        (
            "The gradient of a pixel is local in space",
            "The gradient may be computed over spatial chunks separately",
            "The error of truncation in space lies at the cuts",
            "What truncation in space cuts",
            "A gradient truncated in space has less error",
            "Truncation in space saves nothing",
        ),
        ("spatial_locality", "spatial_truncation"),
    ),
    Question(
        "Does truncation change where training ends?",
        (
            "The truncation distance matters little",
            "Truncated steps make at least",
            "An optimiser that rescales gradients (Adam) removes",
            "When all clips can be fitted exactly",
            "When clips cannot be fitted exactly",
        ),
        ("training_bias",),
    ),
    Question(
        "Are there better estimators than truncation?",
        (
            "At the same distance a look-ahead block",
            "At equal memory",
            "At equal compute",
            "Sampled losses pay with Chop(1)",
            "Sampled losses pay with Exact(offload=False)",
            "For one clip an unbiased randomised truncation",
            "Averaged over as many clips",
            "At cost and mean memory of plain chunks",
            "Adaptive (after",
            "An adaptive distance",
        ),
        ("estimators",),
    ),
    Question("Do our own measures give what is known in closed form?", ("The estimators of this suite return",)),
)
REST = Question("Other statements", ("",), ("",))
"""Of records that no question knows yet."""


def anchor(heading: str) -> str:
    """What a link to a heading leads to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def question_of(statement: str, questions: Sequence[Question] = QUESTIONS) -> Question:
    """The one that a statement answers."""
    return next((q for q in questions if q.place(statement) is not None), REST)


def question_of_figure(name: str, questions: Sequence[Question] = QUESTIONS) -> Question:
    """The one that a figure belongs to."""
    return next((q for q in questions if any(name.startswith(start) for start in q.figures)), REST)
