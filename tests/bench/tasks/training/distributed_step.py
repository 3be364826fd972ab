"""One update of a training, its gradients written to a file; by the processes of a test, or by ``accelerate launch``:

    accelerate launch --multi_gpu --num_processes 2 \
        tests/bench/tasks/training/distributed_step.py SETTINGS GRADIENTS 2 [fsdp]

Accelerate shards on GPUs only; with ``fsdp`` it is told to do so here, where torch's FSDP2 runs on CPUs with gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

import bench.tasks.training.train
from bench.tasks.data.order import Order
from bench.tasks.training.settings import TrainSettings, settings_from
from bench.tasks.training.train import Training


def sharding_on_cpu(**arguments: Any) -> Accelerator:
    accelerator = Accelerator(**arguments)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which states made later copy
    return accelerator


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def on_worker(rank: int, settings: TrainSettings, out: Path, count: int, fsdp: bool, store: Path) -> None:
    """The same in one of ``count`` processes, which meet at a file."""
    if count > 1:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
            os.environ[name] = str(value)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    one_update(settings, out, count, fsdp)


def one_update(settings: TrainSettings, out: Path, count: int, fsdp: bool) -> None:
    if fsdp:
        bench.tasks.training.train.Accelerator = sharding_on_cpu
    # A last layer of zeros would let no gradient through to the others.
    torch.nn.init.zeros_ = lambda tensor: torch.nn.init.normal_(tensor, std=0.02)
    training = Training(settings)
    a = training.accelerator
    assert a.num_processes == count
    sharded = any(hasattr(p, "full_tensor") for p in training.model.parameters())
    assert sharded == fsdp
    order = Order(len(training.data), settings.batch, settings.seed, 0, 1, a.process_index, a.num_processes)
    found: dict[str, torch.Tensor] = {}
    original = training._clip_and_share

    def keep() -> None:
        original()
        if found:  # a later update
            return
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                found[name.removeprefix("module.")] = whole(parameter.grad)
        if training.decoder_state:
            found.update({f"decoder.{k}": p.grad for k, p in enumerate(training.decoder_state.parameters)})

    training._clip_and_share = keep
    terms = training.update([training.data.batch(rows) for rows in order])
    if sharded:  # a checkpoint, and weights that come out whole
        training.step = settings.steps - 1
        training.run()
        assert len(list((settings.out / "checkpoints").glob("step-*"))) == 1
    if a.is_main_process:
        found["terms"] = torch.tensor(list(terms.values()))
        save_file({k: v.contiguous() for k, v in found.items()}, out)
    a.wait_for_everyone()
    os._exit(0)  # all is written; taking gloo's threads down at exit aborts the process now and then


if __name__ == "__main__":
    one_update(
        settings_from(json.loads(Path(sys.argv[1]).read_text())),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4:] == ["fsdp"],
    )
