"""What the measured errors of truncation in space say: means over clips with intervals, and claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.tables import with_interval

Row = Mapping[str, Any]
CASE = ("residual", "loss", "strips", "space")
TOLERANCE = 0.1  # relative error
SPACE = 2  # latent rows: of a pixel's gradient they hold over 99 % (spatial_locality.py)
AT_CUTS = 0.9
PARTS = (("frames_alone", "the changed frames alone"), ("decoder_alone", "the changed decoder alone"))


def summarise(samples: Sequence[Row]) -> dict[str, Any]:
    """Means and intervals over clips, of gradients and of what tiles make of the frames."""
    clips = [s["clip"] for s in samples]

    def interval(values: Iterable[float]) -> list[float]:
        return list(mean_interval(list(values), clips))

    gradients, tiles = [], []
    for k, first in enumerate(samples[0]["gradients"]):
        found = [s["gradients"][k] for s in samples]
        row: dict[str, Any] = {key: first[key] for key in CASE}
        for who in (key for key in first if key not in CASE):
            row[who] = {name: interval(f[who][name] for f in found) for name in first[who]}
        row["tiled_minus_truncated"] = interval(
            f["tiled"]["relative_error"] - f["truncated"]["relative_error"] for f in found
        )
        gradients.append(row)
    for k, first in enumerate(samples[0]["tiles"]):
        found = [s["tiles"][k] for s in samples]
        measured = {name: interval(f[name] for f in found) for name in ("psnr_db", "relative_error")}
        tiles.append({key: first[key] for key in ("residual", "strips", "space")} | measured)
    return {
        "latent_rows": samples[0]["latent_rows"],
        "gradients": gradients,
        "tiles": tiles,
        "floor_psnr_db": {
            name: interval(s["floor_psnr_db"][name] for s in samples) for name in samples[0]["floor_psnr_db"]
        },
        "control": {name: max(s["control"][name] for s in samples) for name in samples[0]["control"]},
    }


def label(row: Row) -> str:
    """Of an adjoint: the residual and the loss."""
    return row["residual"] if row["loss"] is None else f"{row['residual']} {row['loss']}"


def claims(name: str, summary: Row) -> list[Claim]:
    """Of one decoder."""
    strips = summary["gradients"][0]["strips"]
    height = summary["latent_rows"] // strips
    spaces = sorted({row["space"] for row in summary["gradients"]})
    space = SPACE if SPACE in spaces else spaces[-1]
    of_height = [row for row in summary["gradients"] if row["strips"] == strips]
    at = [row for row in of_height if row["space"] == space]
    floor = ", ".join(f"{who} {triple[0]:.1f} dB" for who, triple in summary["floor_psnr_db"].items())
    by_space = "; ".join(
        f"k={k} " + ", ".join(f"{label(r)} {with_interval(r['truncated']['relative_error'])}" for r in of_height
                              if r["space"] == k)
        for k in spaces
    )  # fmt: skip
    cosines = ", ".join(f"{label(r)} {r['truncated']['cosine'][0]:.4f}" for r in at)
    beside = "; ".join(
        f"k={k} "
        + ", ".join(
            f"{label(r)} " + " against ".join(f"{r[who]['relative_error'][0]:.3f}" for who in ("tiled", "truncated"))
            for r in of_height if r["space"] == k
        )
        + f", frames {_tile(summary, strips, k)} dB"
        for k in spaces
    )  # fmt: skip
    parts = "; ".join(
        f"{label(r)}, k={r['space']}: "
        + ", ".join(f"{r[who]['relative_error'][0]:.3f} by {what}" for who, what in PARTS)
        for r in of_height if "frames_alone" in r and r["space"] in spaces[:2]
    )  # fmt: skip
    cut = [row for row in summary["gradients"] if row["space"] == 0]
    near = ", ".join(f"{label(r)} {with_interval(r['truncated']['share_at_cuts'], 2)}" for r in cut
                     if r["strips"] == strips)  # fmt: skip
    return [
        Claim(
            f"The gradient may be computed over spatial chunks separately: cut {space} latent rows beyond strips of "
            f"{height}, its relative error is below {TOLERANCE} ({name}).",
            "Sec. 3.3",
            _verdict(at, lambda r: r["truncated"]["relative_error"], below=TOLERANCE),
            f"{by_space}; cosine at k={space}: {cosines}; the target is met to {floor}",
        ),
        Claim(
            "A gradient truncated in space has less error than that of independent tiles with as many rows of overlap "
            f"({name}).",
            "ours",
            _verdict(summary["gradients"], lambda r: r["tiled_minus_truncated"], above=0.0),
            f"strips of {height}, tiles against truncated: {beside}; of the tiles' error {parts}",
        ),
        Claim(
            f"The error of truncation in space lies at the cuts: at k=0 over {100 * AT_CUTS:.0f} % of its square in "
            f"the two latent rows at a cut ({name}).",
            "ours",
            _verdict(cut, lambda r: r["truncated"]["share_at_cuts"], above=AT_CUTS),
            f"strips of {height}: {near} (spread evenly {2 * (strips - 1) / summary['latent_rows']:.2f})",
        ),
    ]


def _tile(summary: Row, strips: int, space: int) -> str:
    """PSNR of tiled frames, by residual."""
    rows = [t for t in summary["tiles"] if (t["strips"], t["space"]) == (strips, space)]
    return " and ".join(f"{t['psnr_db'][0]:.1f}" for t in rows)


def _verdict(
    rows: Sequence[Row],
    of: Callable[[Row], Sequence[float]],
    below: float = float("inf"),
    above: float = float("-inf"),
) -> Verdict:
    """Whether intervals lie between the limits: all of them, or one beyond, or it cannot be told."""
    triples = [of(row) for row in rows]
    if all(low > above and high < below for _, low, high in triples):
        return "holds"
    return "fails" if any(high <= above or low >= below for _, low, high in triples) else "undecided"
