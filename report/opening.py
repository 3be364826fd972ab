"""What the HTML page opens with: the one line of code, and the memory that it is predicted to take."""

from __future__ import annotations

import re
from pathlib import Path

from bench.cases import label
from bench.page.targets import PAPER
from bench.published import CASES, GIB, predictions
from chopgrad import Exact, Full
from suite.records import ROOT
from suite.tables import markdown_table

LINE = "chopgrad.patch(pipe.vae)"
LEAST = Exact(offload=True, pieces=True, strips=16)
"""What the line does where little memory is free; with more strips it does with less."""
WORDS = """\
Training through the decoder of a latent video model keeps the activations of the whole video. One line lets
`vae.decode` go group by group: frames and gradients stay those of plain back-propagation."""
TABLE = f"""\
Peak device memory, weights included, as the planner predicts it (**not measured**; MSE, bfloat16). Where little
is free, the one line is `{label(LEAST)}`; time is relative to full back-propagation, on an H200."""


def opening(results: Path, readme: Path = ROOT / "README.md") -> str:
    """Markdown.

    Args:
        results: folder with the planner's records; without them there is only the code.

    Raises:
        ValueError: the README does not show the line.
    """
    blocks = re.findall(r"^```python\n.*?^```$", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    code = next((block for block in blocks if LINE in block), None)
    if code is None:
        raise ValueError(f"'{readme.name}' has no block of Python with '{LINE}', which the page is to open with.")
    lines = ["# Memory: what one line does", "", WORDS, "", code, ""]
    by_size = predictions(results / "predicted_memory")
    rows = []
    for vae, frames, height, width in CASES.values():
        at = by_size.get((vae, height, width), {}).get(frames, {})
        if {label(m) for m in (Full(), PAPER, LEAST)} <= set(at):
            full, paper, ours = (at[label(m)] for m in (Full(), PAPER, LEAST))
            gib = [f"{row['device_bytes'] / GIB:,.1f}" for row in (full, paper, ours)]
            rows.append([f"{vae}, {frames} frames of {height}x{width}", *gib, f"{ours['host_bytes'] / GIB:,.1f}",
                         f"{ours['relative_seconds']:.2f}"])  # fmt: skip
    if rows:
        header = ["video", "full back-propagation, GiB", f"the paper's {label(PAPER)}, GiB", "the one line, GiB",
                  "and on the host, GiB", "time"]  # fmt: skip
        lines += [TABLE, "", markdown_table(header, rows), ""]
        lines += ["![Predicted memory against frames](results/predicted_memory/curves.png)", ""]
    return "\n".join(lines)
