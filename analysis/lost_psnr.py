"""Why does a pixel loss lose PSNR in some end tasks? ``python analysis/lost_psnr.py`` (cf. Tables 2 and 3).

In artifact removal and inpainting the loss on pixels is LPIPS, as in the paper, and the fine-tuned models have a lower
PSNR than latent-only training, or none that is higher. Two explanations: LPIPS asks for something else than small
squared errors (the trade-off of perception and distortion), or the gradient through the decoder misleads. Here the same
trainings are made with MSE on the pixels in place of LPIPS: from the same start, on the same clips in the same order.
If PSNR is then not lost, it was the loss.

Cost: about two minutes for the small settings on one core, twenty with ``--full``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tasks import TASKS, LossTerm
from bench.tasks.comparison import TaskResults, better, results_of
from bench.tasks.protocol import Protocol, run
from bench.tasks.tables import head
from bench.tasks.training.arms import MEANING
from suite.command_line import run_main
from suite.records import ROOT
from suite.tables import markdown_table, with_interval

ASKED = ("artifact-removal", "inpainting")
ARMS = ("chop-1", "exact")
SHOWN = ("psnr", "ssim", "lpips-vgg")


@dataclass
class Config:
    """Settings of the comparison."""

    full: bool = False
    """As in the committed end tasks, whose records it stands beside."""
    tasks: tuple[str, ...] = ASKED
    """Tasks whose loss on pixels is LPIPS."""
    seeds: int | None = None
    """Seeds of an arm. None: 2, or 5 with --full."""
    cpu: bool = False
    """Leave a GPU alone."""
    out: Path | None = None
    """Folder of records and table. None: runs/lost_psnr, or results/lost_psnr with --full."""


def variant(name: str) -> str:
    """Makes a task known that is the named one with MSE on pixels in place of LPIPS; returns its name.

    Raises:
        ValueError: there is no such task, or it has no LPIPS on pixels.
    """
    if name not in TASKS or LossTerm("lpips", "pixel") not in TASKS[name].losses:
        fitting = [t.name for t in TASKS.values() if LossTerm("lpips", "pixel") in t.losses]
        raise ValueError(f"--tasks takes tasks with LPIPS on pixels ({', '.join(fitting)}), got '{name}'.")
    losses = tuple(LossTerm("mse", "pixel") if t == LossTerm("lpips", "pixel") else t for t in TASKS[name].losses)
    new = f"{name}-mse"
    TASKS[new] = dataclasses.replace(TASKS[name], name=new, losses=losses)
    return new


def of_variants(folder: Path, tasks: Sequence[str]) -> dict[str, TaskResults]:
    """Task -> the records of its variant in a folder."""
    variants = {f"{name}-mse": name for name in tasks}
    return {variants[r.task]: r for r in results_of(folder, variants)}


def table(mse: dict[str, TaskResults], lpips: dict[str, TaskResults]) -> str:
    """Differences to latent-only with either loss."""
    rows: list[list[object]] = []
    for task, ours in mse.items():
        for loss, results in (("LPIPS", lpips.get(task)), ("MSE", ours)):
            for arm in ARMS:
                found = [results.difference(arm, m) if results else None for m in SHOWN]
                cells = [with_interval(d) if d else "n/a" for d in found]
                rows.append([task, loss, MEANING[arm], *cells])
    header = ["task", "loss on pixels", "arm", *(f"{head(m)}, minus latent" for m in SHOWN)]
    return markdown_table(header, rows)


def verdict(task: str, mse: TaskResults, lpips: TaskResults | None) -> str:
    """One sentence on the exact gradient's PSNR, read from the intervals."""
    with_mse, with_lpips = (r.difference("exact", "psnr") if r else None for r in (mse, lpips))
    if with_mse is None or with_lpips is None:
        return f"{task}: one of the two losses was not measured; run this script and the end tasks with --full."
    numbers = f"(LPIPS {with_interval(with_lpips)} dB, MSE {with_interval(with_mse)} dB)"
    ours, theirs = better("psnr", with_mse), better("psnr", with_lpips)
    if ours is False:
        return f"{task}: PSNR is lost with MSE on the pixels, too {numbers}: LPIPS is not what costs it."
    wins = "wins PSNR" if ours else "does not lose PSNR"
    if theirs is False:
        return f"{task}: MSE through the same decoder {wins}, LPIPS loses it {numbers}: the loss costs it."
    return f"{task}: MSE through the same decoder {wins}, LPIPS does not lose it either {numbers}."


def report(out: Path, tasks: Sequence[str], full: bool) -> str:
    """The page beside the records."""
    mse = of_variants(out, tasks)
    # Small settings have no records of the end tasks to stand beside.
    lpips = {r.task: r for r in results_of(ROOT / "results" / "tasks")} if full else {}
    command = next(r.by_arm["latent"][0].provenance["command"] for r in mse.values())
    seeds = [max((len(r.by_arm["latent"]) for r in found.values()), default=0) for found in (mse, lpips)]
    return "\n".join([
        "# Why is PSNR lost?", "", f"Command: `{command}`", "",
        "Artifact removal and inpainting with MSE on the pixels in place of the paper's LPIPS; all else as in the",
        "[end tasks](../tasks/README.md). Mean and 95 % interval, paired by seed and clip;",
        f"seeds with MSE: {seeds[0]}, with LPIPS: {seeds[1]}.", "",
        table(mse, lpips), "", *(f"- {verdict(t, r, lpips.get(t))}" for t, r in mse.items()), "",
    ])  # fmt: skip


def main(config: Config) -> None:
    out = config.out or ROOT / ("results" if config.full else "runs") / "lost_psnr"
    variants = tuple(variant(name) for name in config.tasks)
    run(Protocol(full=config.full, tasks=variants, arms=("latent", *ARMS), seeds=config.seeds, fvd_seeds=0,
                 cpu=config.cpu, out=out))  # fmt: skip
    text = report(out, config.tasks, config.full)
    (out / "README.md").write_text(text)
    print(text)
    print(f"Written: README.md and one record an arm and seed in {out.name}/")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {FloatingPointError: ""})
