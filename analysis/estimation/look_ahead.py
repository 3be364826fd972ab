"""Look-ahead blocks: error against cost at equal memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.estimation.data import Data, relative_error
from chopgrad import Chop
from chopgrad.planner import relative_compute
from suite.claims import Claim
from suite.pairwise import truncated
from suite.tables import with_interval
from suite.verdicts import above


def look_ahead(data: Data) -> dict[str, Any]:
    """Relative error at the decoder's input of every block and distance."""
    rows: list[dict[str, Any]] = []
    for memory in range(1, data.groups):
        for block in range(1, memory + 1):
            strategy = Chop(memory - block, block=block)
            errors = [relative_error(truncated(p, strategy.distance, block), p.sum(0)) for p in data.pairs]
            rows.append(
                {
                    "block": block,
                    "distance": strategy.distance,
                    "memory_groups": memory,
                    "relative_compute": relative_compute(strategy, data.groups),
                    "relative_error": data.interval(errors),
                    "errors": errors,
                }
            )
    found = {(r["block"], r["distance"]): r for r in rows}
    paper = [r for r in rows if r["block"] == 1 and r["distance"] > 0]
    lost = []  # per paper distance: the least that an equally large window loses
    for r in paper:
        others = [o for o in rows if o["memory_groups"] == r["memory_groups"] and o["block"] > 1]
        least = min(others, key=lambda o: o["relative_error"][0])
        lost.append(data.interval([b - a for a, b in zip(r["errors"], least["errors"], strict=True)]))
    cheaper: list[Any] = []  # per paper distance: the best block at no more compute and at most twice the memory
    for r in paper:
        most = 2 * r["memory_groups"]
        others = [o for o in rows if o["relative_compute"] <= r["relative_compute"] + 1e-9 and o["block"] > 1]
        others = [o for o in others if o["memory_groups"] <= most]
        if most < data.groups and others:
            best = min(others, key=lambda o: o["relative_error"][0])
            gain = data.interval([a - b for a, b in zip(r["errors"], best["errors"], strict=True)])
            cheaper.append((r, best, gain))
    same = [
        data.interval([b - a for a, b in zip(found[1, d]["errors"], r["errors"], strict=True)])
        for (w, d), r in found.items()
        if w > 1
    ]
    claims = [
        Claim(
            "At the same distance a look-ahead block is never less accurate than the paper's scheme (mean over clips).",
            "ours",
            above([[-x for x in (m, h, lo)] for m, lo, h in same], lenient=True),
            f"largest difference of the relative error over {len(same)} settings: {max(m for m, _, _ in same):.3f}",
        ),
        Claim(
            "At equal memory (W + D groups) the paper's W = 1 has the least error of all blocks.",
            "ours",
            above(lost),
            "; ".join(
                f"{r['memory_groups']} groups: {r['relative_error'][0]:.2f} at compute {r['relative_compute']:.2f}, "
                f"next best block {with_interval(x, 3)} worse"
                for r, x in list(zip(paper, lost, strict=True))[:3]
            ),
        ),
        Claim(
            "At equal compute and twice the memory a look-ahead block has less error than the paper's scheme.",
            "ours",
            above([g for _, _, g in cheaper]) if cheaper else "undecided",
            "; ".join(
                f"D={r['distance']} in {r['memory_groups']} groups {r['relative_error'][0]:.3f}, W={b['block']} "
                f"D={b['distance']} in {b['memory_groups']} groups {b['relative_error'][0]:.3f} at "
                f"{b['relative_compute'] / r['relative_compute']:.2f} of the compute"
                for r, b, _ in cheaper[:3]
            ),
        ),
    ]
    for r in rows:
        del r["errors"]
    return {"rows": rows, "claims": [asdict(c) for c in claims]}
