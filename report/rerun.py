"""Records of ``results/`` made again with today's code, in a temporary folder: by the command that made them.

Scripts go on after an interruption with what is missing. So all other records are laid into the folder as if they had
just been made, and the command finds some that are not there. What a script knows by no record it does again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tasks.protocol import code_fingerprint
from bench.tasks.training.settings import TrainSettings
from report.freshness import script_of
from suite.clips import HELD_OUT_CLIPS, TRAINING_CLIPS
from suite.records import ROOT, Record, provenance, read_record, write_record

PACKAGED = tuple(f"{name}.mp4" for name in (*TRAINING_CLIPS, *HELD_OUT_CLIPS))
FOLDERS = ("--clips", "--snapshots")
"""Options that name folders of whoever made the record."""


@dataclass(frozen=True)
class Script:
    """What must be said to a script, besides the words of a record's command.

    Args:
        folder: what its ``out`` stands for, relative to ``results/``; None: for the record itself.
        options: a record -> words that leave out what it has nothing to do with.
    """

    folder: str | None
    options: Callable[[Record], list[str]] = lambda _: []
    out: str = "--out"


def _of_bench(record: Record) -> list[str]:
    kind = {"memory": "memory", "prediction": "predict", "gradient_error": "error"}[record.path.parent.name]
    return ["--device", "cpu", "--phases", kind]


def _of_variants(record: Record) -> list[str]:
    s = record.settings
    return ["--device", "cpu", "--vaes", s["vae"], "--variants", s["variant"], "--page", "none"]


def _of_tasks(record: Record) -> list[str]:
    s = record.settings
    return ["--cpu", "--tasks", s["task"].removesuffix("-mse"), "--seeds", str((s["seed"] or 0) + 1)]


SCRIPTS = {
    "analysis/gradient_bias.py": Script(None, lambda _: ["--device", "cpu"]),
    "analysis/lost_psnr.py": Script("lost_psnr", _of_tasks),
    "analysis/predicted_memory.py": Script("predicted_memory"),
    "bench/__main__.py": Script("", _of_bench),
    "bench/gpu/page.py": Script("gpu", out="--results"),
    "bench/tasks/__main__.py": Script("tasks", _of_tasks),
    "bench/variants.py": Script("variants", _of_variants),
    "weights/evaluate.py": Script(None, lambda _: ["--device", "cpu"]),
}


def script(record: Record) -> Script | None:
    """None for one that makes no single record."""
    name = script_of(record.provenance["command"]) or ""
    return SCRIPTS.get(name) or (Script("theory") if name.startswith("analysis/") else None)


def obstacle(record: Record, clips: Path | None) -> str | None:
    """Why it cannot be made again here, as the rest of a sentence that begins with the record; None where it can."""
    if record.provenance["cuda"]:
        return f"was measured on a GPU ({record.provenance['device']}): measure again as a whole, with its command"
    if record.path.parent.name == "time":
        return "holds nothing but times, which are of one machine at one hour"
    if script(record) is None:
        return f"comes from a command that makes no single record ({record.provenance['command']})"
    if str(record.settings.get("vae", "")).startswith("snapshot "):
        return "needs the snapshots of a training run, which are not kept"
    if record.settings.get("pretrained"):
        return f"needs weights from a hub ({record.settings['pretrained']})"
    if missing := [name for name in _videos(record) if clips is None or not (clips / name).is_file()]:
        return f"needs --clips with {', '.join(missing)}"
    return None


def together(record: Record) -> tuple[str, ...]:
    """What is the same of records that one run makes."""
    how = script(record)
    return (record.provenance["command"], *(how.options(record) if how else ()), *_videos(record))


def rerun(
    records: Sequence[Record], results: Path, folder: Path, clips: Path | None = None, seconds: float | None = None
) -> list[Record]:
    """The records as today's code makes them, in one run with as many threads as then.

    Args:
        records: some that are made ``together``.
        results: the folder of all records.
        folder: an empty one, for everything that is written.
        clips: of the videos that the command was given.
        seconds: at most so many.

    Raises:
        RuntimeError: the command failed, or left a record out; says how it ended.
        TimeoutError: it took longer.
    """
    first, how = records[0], script(records[0])
    assert how is not None
    places = [record.path.relative_to(results) for record in records]
    _lay_out(results, folder / "results", places)
    out = folder / "results" / (places[0] if how.folder is None else how.folder)
    words = _without_folders(shlex.split(first.provenance["command"])[1:])
    if (videos := _videos(first)) and clips is not None:
        (folder / "clips").mkdir()
        for name in videos:
            (folder / "clips" / name).symlink_to((clips / name).resolve())
        words += ["--clips", str(folder / "clips")]
    threads = {"OMP_NUM_THREADS": str(first.provenance["threads"]), "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words, *how.options(first), how.out, str(out)], cwd=ROOT, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | threads,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not finished within {seconds or 0:.0f} s") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    made = [folder / "results" / place for place in places]
    if process.returncode or not all(path.is_file() for path in made):
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"exit code {process.returncode}, {'' if process.returncode else 'no record: '}{last[0]}")
    return [read_record(path) for path in made]


def _lay_out(results: Path, folder: Path, left_out: Sequence[Path]) -> None:
    """All records but some, as if this process had made them."""
    made_by = provenance()
    # What the settings of a training say today of the same training.
    today = {"code": code_fingerprint(), "checkpoint": TrainSettings.checkpoint}
    kept = ("commit", "dirty", "torch", "diffusers", "device")
    for path in sorted(results.rglob("*.json")):
        place = path.relative_to(results)
        if place in left_out:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            old = read_record(path)
        except ValueError:
            continue
        trained = today if "code" in old.settings else {}
        now = {} if old.provenance["cuda"] else {key: made_by[key] for key in kept}
        write_record(folder / place, old.settings | trained, old.metrics, old.provenance | now)


def _videos(record: Record) -> list[str]:
    """Names of the videos of a record that come with no package."""
    given = "--clips" in shlex.split(record.provenance["command"])
    named = [*record.settings.get("clips", ()), *record.settings.get("clips_too_short", ())] if given else []
    return [name for name in named if name not in PACKAGED]


def _without_folders(words: list[str]) -> list[str]:
    """A command without folders that may be gone."""
    gone = {k for k, word in enumerate(words) if word in FOLDERS or (k and words[k - 1] in FOLDERS)}
    return [word for k, word in enumerate(words) if k not in gone]
