"""The paper's claims (arXiv 2603.17812) in a dozen rows: the table that opens ``results/theory.md``.

Which statements of the records belong to which claim is declared here; verdicts and numbers are read from the records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from suite.claims import Claim, Verdict, is_check

COLUMNS = {"Wan 2.1 decoder": "wan21", "CogVideoX decoder": "cogvideox"}
"""Column -> what the name of a VAE holds, without punctuation; a third column has all that is none of these."""
HEADER = ("the paper's claim", *COLUMNS, "toys, backbone", "condition or correction, numbers", "more")


@dataclass(frozen=True)
class Trial:
    """A statement of the paper as it was tried.

    Args:
        vae: the decoder that the statement is about; empty where it is about toys or a backbone.
        link: to where its numbers stand, as Markdown.
    """

    claim: Claim
    vae: str
    link: str


Remark = Callable[[Sequence[Claim]], str]
"""What a row says beside its verdicts, made from its claims; empty where they have nothing of the kind."""


def numbers(text: str, pattern: str, of: str = "", within: str = "") -> Remark:
    """``text`` with the least and largest number that the pattern finds in the evidence.

    Args:
        of: only of statements that begin so.
        within: only of statements that hold these words.
    """

    def remark(claims: Sequence[Claim]) -> str:
        found = [re.search(pattern, c.evidence) for c in claims if c.statement.startswith(of) and within in c.statement]
        values = sorted({m[1] for m in found if m}, key=lambda value: float(value.split()[0]))
        return text.format(" to ".join(dict.fromkeys((values[0], values[-1])))) if values else ""

    return remark


def constant(text: str) -> Remark:
    """The text, whatever was found."""
    return lambda claims: text


def corrected(text: str) -> Remark:
    """The text, where a claim holds with a correction."""
    return lambda claims: text if any(c.verdict == "holds with correction" for c in claims) else ""


def everywhere(claims: Sequence[Claim]) -> str:
    """The metrics by which pixels win in every task, and those by which they lose in some."""
    by_metric: dict[str, set[Verdict]] = {}
    for claim in claims:
        if found := re.search(r" in (.+) \(", claim.statement):
            by_metric.setdefault(found[1], set()).add(claim.verdict)
    won = [name for name, verdicts in by_metric.items() if verdicts == {"holds"}]
    lost = [name for name, verdicts in by_metric.items() if "fails" in verdicts]
    parts = [f"better in every task: {', '.join(won)}"] if won else []
    return "; ".join([*parts, f"worse in some: {', '.join(lost)}"] if lost else parts)


@dataclass(frozen=True)
class PaperClaim:
    """One row.

    Args:
        says: the claim, in the paper's terms.
        where: section or figure.
        statements: how the statements of the records that test it begin.
    """

    says: str
    where: str
    statements: tuple[str, ...]
    remarks: tuple[Remark, ...] = ()

    def covers(self, claim: Claim) -> bool:
        return claim.source != "ours" and claim.statement.startswith(self.statements)


COSINE = r"cosine ([\d.]+)"
MAGNITUDE, AT_D1 = "The error is one of magnitude", r"D=1 ([\d.]+)"
ADAM, ADAM_ON_TOYS = "The optimiser rescales the error away", "An optimiser that rescales gradients (Adam) removes"
CHUNKS = "The gradient may be computed over spatial chunks separately"
PAPER = (
    PaperClaim(
        "Influence decays exponentially with temporal distance: I(i, j) <= C exp(-alpha D(i, j))", "Sec. 3.2, Fig. 3",
        ("Temporal locality: there are C, alpha > 0", "Influence decays exponentially with temporal distance"),
        (
            corrected("in the end it decays faster, and C needs a margin"),
            numbers("the worst pair of another clip exceeds the bound {} times", r"exceeds it ([\d.]+) times"),
        ),
    ),
    PaperClaim(
        "The truncation error is at most the sum of the cut terms, and their geometric tail", "Sec. 3.2",
        ("The truncation error is at most",),
        (
            constant("that the sum bounds it cannot fail, and checks the code; how near it is can be told"),
            numbers("the sum is {} times the error on average", r"cases, bound / error ([\d.]+) .*of that"),
            numbers("the tail {} times", r"bound / error ([\d.]+) .*alpha"),
        ),
    ),
    PaperClaim(
        "D >= log(C/eps)/alpha is enough for tolerance eps", "Sec. 3.2",
        ("D >= log(C/eps)/alpha is enough for tolerance eps",),
        (
            corrected("as printed it lacks the size G of the loss gradient, and 1 / (1 - exp(-alpha))"),
            numbers("as printed it is enough in {} % of cases where the loss is a sum", r"loss as a sum (\d+) %"),
            numbers("with G in it {} %", r"with G (\d+) %"),
            numbers("corrected, it asks for no truncation in {} %", r"corrected \d+ % \([^;]*; whole video in (\d+) %"),
        ),
    ),
    PaperClaim(
        "At the decoder's input the truncated gradient points where the full one does", "Sec. 3.3, Fig. 5",
        ("At D = 1 the gradient of the latents keeps a cosine",),
        (
            numbers("cosine at D = 1 against the film {}", COSINE, within="residual film, mse"),
            numbers("against the decoder's own frames {}", COSINE, within="own, mse"),
            numbers("with a random adjoint {}", COSINE, within="residual random"),
        ),
    ),
    PaperClaim(
        "At small distances the error of the backbone's gradient is large", "Sec. 3.3, Fig. 4",
        ("At small distances the error of the backbone's gradient is large",),
        (numbers("normalised MAE at D = 1: {}", AT_D1),),
    ),
    PaperClaim(
        "Yet its cosine with the full gradient is high", "Sec. 3.3, Fig. 4",
        ("Yet its cosine with the full gradient is high",),
        (numbers("cosine at D = 1: {}", AT_D1),),
    ),
    PaperClaim(
        "So that error is one of magnitude", "Sec. 3.3, Fig. 4", (MAGNITUDE,),
        (numbers("at D = 1 the best scale removes {} of the squared error", AT_D1),),
    ),
    PaperClaim(
        "Optimisers rescale it away", "Sec. 3.3", (ADAM, ADAM_ON_TOYS),
        (
            numbers("normalised MAE at D = 1: of Adam's update {}", r"of the update .*?D=1 ([\d.]+)", ADAM),
            numbers("of the gradient {}", r"of the gradient .*?D=1 ([\d.]+)", ADAM),
            numbers("on toys it leaves {} times gradient descent's gap", r"gradient descent ([\d.]+)", ADAM_ON_TOYS),
        ),
    ),
    PaperClaim(
        "Memory is linear in the truncation distance, and constant in the length of the video", "Sec. 3.3, Fig. 6",
        ("Peak memory is linear in the truncation distance", "Peak memory does not depend on the length of the video"),
        (
            numbers("R^2 of a line {}", r"R\^2 of a line ([\d.]+)"),
            numbers("at D = 1 the longest video takes {} times the peak of the shortest", r"peak at .*D=1 ([\d.]+)"),
        ),
    ),
    PaperClaim(
        "Time is linear in the truncation distance", "Sec. 3.3, Fig. 6", ("Time is linear in the truncation distance",),
        (
            numbers("R^2 of a line {}", r"R\^2 of a line ([\d.]+)"),
            numbers("at D = 1 {} of the time of full back-propagation", r"D=1 ([\d.]+) .*time of Full\(\)"),
        ),
    ),
    PaperClaim(
        "The gradient is local in space", "Sec. 3.3, Fig. 7", ("The gradient of a pixel is local in space",),
        (numbers("four latent cells around hold {} of its energy", r"within 4 cells ([\d.]+)"),),
    ),
    PaperClaim(
        "So it may be computed over spatial chunks separately", "Sec. 3.3, Fig. 7", (CHUNKS,),
        (
            numbers("strips cut at their border: relative error {} with a random adjoint", r"k=0 .*?random ([\d.]+)"),
            numbers("{} with MSE and the film as target", r"k=0 .*?film mse ([\d.]+)"),
            numbers("two latent rows beyond: {}", r"k=2 .*?random ([\d.]+)"),
            numbers("and {}", r"k=2 .*?film mse ([\d.]+)"),
        ),
    ),
    PaperClaim(
        "Losses on pixels beat training in latent space only", "Sec. 4, Tables 1 to 4",
        ("A loss on pixels through the decoder beats latent-only training",), (everywhere,),
    ),
    PaperClaim(
        "The truncation distance matters little for training", "Sec. 4, Table 2",
        ("The truncation distance matters little",),
        (
            numbers("in end tasks D = 1 keeps {} % of the exact gradient's gains", r"D = 1 keeps (\d+) %"),
            numbers("in a short training of a backbone it makes {} of its progress", r"D=1 ([\d.]+ \[[\d., ]+\])"),
        ),
    ),
)  # fmt: skip


def summary(trials: Iterable[Trial]) -> list[tuple[str, ...]]:
    """Cells of each row, without the claims of the paper that nothing was found for."""
    everything, rows = list(trials), []
    for row in PAPER:
        if mine := [t for t in everything if row.covers(t.claim)]:
            judged = [t for t in mine if not is_check(t.claim)]
            cells = [word([t.claim.verdict for t in judged if column_of(t.vae) == name]) for name in HEADER[1:-2]]
            said = "; ".join(text for remark in row.remarks if (text := remark([t.claim for t in mine])))
            rows.append((f"{row.says} ({row.where})", *cells, said, ", ".join(dict.fromkeys(t.link for t in mine))))
    return rows


def column_of(vae: str) -> str:
    """Of the table."""
    plain = re.sub(r"[^a-z0-9]", "", vae.lower())
    return next((column for column, part in COLUMNS.items() if part in plain), HEADER[3])


def word(verdicts: Sequence[Verdict]) -> str:
    """One verdict where all agree; else each with its count: ``fails 2 of 4, undecided 2``."""
    counts = Counter(verdicts)
    if len(counts) < 2:
        return "".join(f"**{verdict}**" for verdict in counts)
    first, *others = (f"**{verdict}** {counts[verdict]}" for verdict in get_args(Verdict) if counts[verdict])
    return ", ".join([f"{first} of {len(verdicts)}", *others])
