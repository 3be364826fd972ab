"""The weights of a finished run, as diffusers and its pipelines read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from bench.tasks.training.settings import TrainSettings, settings_from

TRANSFORMER, VAE, LORA = "transformer", "vae", "pytorch_lora_weights.safetensors"
FILE = "diffusion_pytorch_model.safetensors"


def save_weights(accelerator: Accelerator, out: Path, model: Any, vae: Any | None) -> None:
    """LoRA layers as ``pipeline.load_lora_weights(out)`` takes them, or the whole transformer in ``out/transformer``;
    a trained VAE in ``out/vae``.
    """
    restorer = accelerator.unwrap_model(model)
    backbone, weights = restorer.backbone, {}
    for name, tensor in backbone.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # every process takes part
        if accelerator.is_main_process:
            weights[name] = tensor.detach().cpu().contiguous()
    if not accelerator.is_main_process:
        return
    if _has_lora(backbone):
        from diffusers import CogVideoXPipeline, WanPipeline
        from peft import get_peft_model_state_dict

        pipeline: Any = WanPipeline if restorer.family == "wan" else CogVideoXPipeline
        layers = get_peft_model_state_dict(backbone, state_dict=weights)
        pipeline.save_lora_weights(out, transformer_lora_layers=layers)
    else:
        backbone.save_config(out / TRANSFORMER)
        save_file(weights, out / TRANSFORMER / FILE, metadata={"format": "pt"})
    if vae is not None:
        vae.save_pretrained(out / VAE)


def load_weights(folder: Path, model: Any, vae: Any) -> None:
    """Fill a restorer (and the VAE) with the weights of a finished run.

    Raises:
        ValueError: no finished run, or one of another model.
    """
    folder = Path(folder)
    if not (folder / "finished.json").is_file():
        raise ValueError(f"'{folder.name}' holds no finished run: pass the --out of one that has ended.")
    backbone = model.backbone
    try:
        if _has_lora(backbone):
            from peft import set_peft_model_state_dict

            saved = {k.removeprefix("transformer."): v for k, v in load_file(folder / LORA).items()}
            result: Any = set_peft_model_state_dict(backbone, saved)
            if result.unexpected_keys:
                raise RuntimeError(f"unexpected {result.unexpected_keys[0]}")
        else:
            backbone.load_state_dict(load_file(folder / TRANSFORMER / FILE))
        if (folder / VAE).is_dir():
            vae.load_state_dict(load_file(folder / VAE / FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The run in '{folder.name}' does not fit this model: {reason}") from error


def settings_of(folder: Path) -> TrainSettings:
    """The settings of a run.

    Raises:
        ValueError: no run there.
    """
    try:
        return settings_from(json.loads((Path(folder) / "run.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{Path(folder).name}' holds no run: pass the --out of one.") from error


def _has_lora(backbone: Any) -> bool:
    return bool(getattr(backbone, "peft_config", None))
