"""Checkpoints of a run: written whole or not at all, the last two kept, and found again after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.tasks.training.settings import TrainSettings, settings_from
from chopgrad import CausalDecoder

TRAINABLE = "trainable.safetensors"
KEPT = 2


class DecoderState:
    """The decoder's trained parameters and their optimiser, which accelerate saves beside the model's."""

    def __init__(self, decoder: CausalDecoder, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [p for p in decoder.parameters() if p.requires_grad]
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [p.detach().cpu() for p in self.parameters], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def only_what_trains(accelerator: Accelerator) -> None:
    """Let checkpoints hold the parameters that train, not the frozen weights beside them. (FSDP saves shards.)"""

    def unwrapped(models: list[nn.Module]) -> nn.Module:
        return accelerator.unwrap_model(models[0])

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if weights:
            weights.clear()  # accelerate then writes no model file of its own
            if accelerator.is_main_process:
                save_file(trainable(unwrapped(models)), Path(folder) / TRAINABLE)

    def load(models: list[nn.Module], folder: str) -> None:
        if models:
            model = unwrapped(models)
            models.clear()
            saved = load_file(Path(folder) / TRAINABLE)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, by name, on the CPU."""
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """``folder/step-N``, under another name until it is complete."""
    path = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step."""
    found = sorted(folder.glob("step-*"))
    return (found[-1], int(found[-1].name.removeprefix("step-"))) if found else None


def same_run(path: Path, settings: TrainSettings) -> None:
    """Keep the settings of a run beside it, and refuse to go on with others; only ``steps`` may change.

    Raises:
        ValueError: the folder holds a run with other settings; the message says which.
    """
    wanted = settings.described()
    if path.exists():
        old = settings_from(json.loads(path.read_text())).described()
        other = [k for k in wanted if k != "steps" and old[k] != wanted[k]]
        if other:
            raise ValueError(
                f"'{path.parent.name}' holds a run with {other[0]} {old[other[0]]!r}, this one has "
                f"{wanted[other[0]]!r}: pass another --out, or remove that folder."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings.everything(), indent=1) + "\n")


def follow(path: Path, upto: int) -> Callable[[dict[str, Any]], None]:
    """A log of one JSON line a step; lines of steps after ``upto``, of a run that was cut, are dropped."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= upto:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # half a line
                continue
    path.write_text("".join(kept))

    def write(row: dict[str, Any]) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    return write
