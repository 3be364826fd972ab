"""Does influence decay with temporal distance? ``python analysis/temporal_locality.py`` (Fig. 3 of arXiv 2603.17812).

On crops of real clips, at the latents of the VAE's own encoder, the influence of latent z_j on the frames x_i is
measured in the Frobenius norm for all j and several i, and in the operator norm for some pairs. Then

- the exponential of the paper's temporal locality is fitted and compared with a power law and a finite support;
- the bound I(i,j) <= C exp(-alpha D) is fitted on all crops but those of one clip and tested on those left out;
- the same decoder before training, and at snapshots of a training run, tells whether training makes the locality.

The first group differs in kind (one frame for Wan, more latents for CogVideoX): fits leave it out, bounds do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.locality.claims import claims, course_claim
from analysis.locality.figure import figure
from analysis.locality.fits import summarise
from analysis.locality.influence import frobenius_norm, frobenius_samples, operator_norms
from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.receptive_field import untrained
from analysis.settings import OnClips
from chopgrad import CausalDecoder
from suite.command_line import run_main
from suite.printing import print_claims
from suite.records import Record
from suite.vaes import load_vae


@dataclass
class Config(OnClips):
    """Settings of the measurement of temporal locality."""

    full: bool = False
    """Longer and larger crops, and more of them."""
    snapshots: Path | None = None
    """Snapshots of a training run (weights/train.py --snapshot-steps): a folder of folders step-<step>."""

    @property
    def crops(self) -> Crops:
        return Crops(self.clips, count=2, frames=97, size=(64, 64)) if self.full else self.small_crops

    @property
    def small_crops(self) -> Crops:
        """Of the small settings, and of snapshots, of which there are many."""
        return Crops(self.clips, count=2, frames=65, size=(32, 32))

    @property
    def probes(self) -> int:
        return 3 if self.full else 2


OPERATOR_DISTANCES = (0, 1, 2)


def influences(decoder: CausalDecoder, latents: Tensor, probes: int, distances: tuple[int, ...]) -> dict[str, Any]:
    """Frobenius norms [outputs][j] with standard errors, and operator norms of pairs at the distances given."""
    count = len(decoder.frame_groups(latents.shape[2]))
    outputs = sorted({count - 1, (3 * count) // 4, count // 2})
    norm, error = frobenius_norm(frobenius_samples(decoder, latents, outputs, probes))
    j = max(1, count // 3)
    pairs = [(j + d, j) for d in distances if j + d < count]
    found = operator_norms(decoder, latents, pairs) if pairs else {}
    return {
        "outputs": outputs,
        "frobenius": [row[: i + 1].tolist() for row, i in zip(norm, outputs, strict=True)],
        "frobenius_standard_error": [row[: i + 1].tolist() for row, i in zip(error, outputs, strict=True)],
        "operator": [[i, j, value] for (i, j), value in found.items()],
    }


def measure(config: Config) -> list[Record]:
    """One record for each decoder, for its untrained form, and for each snapshot."""
    _snapshots(config.snapshots)  # before any work
    shared = {"full": config.full, "probes": config.probes}
    records = []

    def run(
        label: str, vae: tuple[str, Any], distances: tuple[int, ...], crops: Crops
    ) -> tuple[Record, dict[str, Any]]:
        path = config.folder / f"temporal_locality-{label}.json"
        settings = {**shared, "operator_distances": list(distances)}
        record = measure_crops(path, vae, crops, lambda d, z, _: influences(d, z, config.probes, distances), settings)
        return record, summarise(record.metrics["samples"])

    for source in config.vaes:
        name = short_name(source)
        model = load_vae(source, config.device, subfolder=config.subfolder)
        young, young_fit = run(f"{name}-untrained", (f"{name}, random weights", untrained(model)), (), config.crops)
        conclude(young, "fits", young_fit, [])
        trained, trained_fit = run(name, (source, model), OPERATOR_DISTANCES, config.crops)
        records.append(conclude(trained, "fits", trained_fit, claims(name, trained_fit, young_fit)))
    course: dict[int, dict[str, Any]] = {}
    for folder in _snapshots(config.snapshots):
        label = f"snapshot-{folder.name}"
        record, course[_step(folder)] = run(
            label, (f"snapshot {folder.name}", load_vae(str(folder), config.device)), (), config.small_crops
        )
        last = folder == _snapshots(config.snapshots)[-1]
        records.append(conclude(record, "fits", course[_step(folder)], [course_claim(course)] if last else []))
    return records


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _snapshots(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    folders = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    found = sorted(folders, key=_step)
    if not found:
        raise ValueError(
            f"'{folder.name}' holds no snapshot folders step-*: pass the 'snapshots' folder of a run of "
            "weights/train.py --snapshot-steps."
        )
    return found


def main(config: Config) -> None:
    records = measure(config)
    names = [short_name(v) for v in config.vaes]
    figure(config.folder, names, _snapshots(config.snapshots), config.folder / "temporal_locality.png")
    print_claims(records)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
