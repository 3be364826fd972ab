"""The model of every end task: one step from the condition's latents to restored latents.

The condition is encoded by the VAE and taken for a noisy sample at one fixed noise level; the diffusion backbone
predicts its velocity once, and that gives the restored latents (arXiv 2603.17812, Sec. 4; DOVE does the same with
CogVideoX). With fresh weights the last layer is zero, so training starts at the condition itself (with CogVideoX at
the condition, scaled).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn

Family = Literal["wan", "cogvideox"]
LORA_TARGETS = {"wan": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
                "cogvideox": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]}  # fmt: skip
TEXT_DIM, TEXT_TOKENS = 8, 1  # of fresh backbones, which are given no text


class Restorer(nn.Module):
    """``[batch, channels, latent frames, h, w]`` condition -> restored latents of the same shape.

    Both in the diffusion model's normalised space (``decoder.denormalize`` leads to the VAE's).

    Args:
        backbone: ``WanTransformer3DModel`` (flow matching: x0 = x - sigma v) or ``CogVideoXTransformer3DModel``
            (v-prediction: x0 = sqrt(a) x - sqrt(1 - a) v).
        timestep: the fixed noise level, 1 to 999.
        prompt: [1, tokens, text width], the embedded prompt; zeros if None.
        scheduler: of CogVideoX, for its noise schedule; the published one if None.
    """

    def __init__(self, backbone: Any, timestep: int = 400, prompt: Tensor | None = None, scheduler: Any = None) -> None:
        super().__init__()
        if not 1 <= timestep <= 999:
            raise ValueError(f"timestep must lie between 1 and 999, got {timestep}.")
        self.backbone = backbone
        self._no_split_modules = backbone._no_split_modules  # what accelerate shards by
        self.family: Family = family_of(backbone)
        width = backbone.config.text_dim if self.family == "wan" else backbone.config.text_embed_dim
        if prompt is None:
            tokens = TEXT_TOKENS if self.family == "wan" else backbone.config.max_text_seq_length
            prompt = torch.zeros(1, tokens, width)
        if prompt.ndim != 3 or prompt.shape[0] != 1 or prompt.shape[2] != width:
            raise ValueError(f"The prompt must be [1, tokens, {width}] for this backbone, got {list(prompt.shape)}.")
        self.prompt: Tensor
        self.register_buffer("prompt", prompt, persistent=False)
        if self.family == "wan":
            self.keep, self.remove = 1.0, timestep / 1000
        else:
            schedule: Any = scheduler or CogVideoXDDIMScheduler()
            alpha = schedule.alphas_cumprod[timestep].item()
            self.keep, self.remove = alpha**0.5, (1 - alpha) ** 0.5
        self.timestep = timestep

    def forward(self, condition: Tensor) -> Tensor:
        self.check(*condition.shape[1:])
        time = torch.full((len(condition),), self.timestep, device=condition.device, dtype=torch.long)
        prompt = self.prompt.to(condition.dtype).expand(len(condition), -1, -1)
        if self.family == "wan":
            velocity = self.backbone(condition, time, prompt, return_dict=False)[0]
        else:
            velocity = self.backbone(
                condition.transpose(1, 2), prompt, time, image_rotary_emb=self._rotary(condition), return_dict=False
            )[0].transpose(1, 2)
        return self.keep * condition - self.remove * velocity

    def check(self, channels: int, latent_frames: int, height: int, width: int) -> None:
        """Raises ValueError: the backbone does not take latents of this shape."""
        config = self.backbone.config
        patch = config.patch_size[1] if self.family == "wan" else config.patch_size
        if channels != config.in_channels:
            raise ValueError(
                f"The backbone takes {config.in_channels} latent channels, the VAE gives {channels}: pass a VAE and a "
                "backbone that belong together."
            )
        if height % patch or width % patch:
            raise ValueError(
                f"The backbone cuts latents into patches of {patch}x{patch}, but a clip has {height}x{width} latents: "
                f"pass a height and width that are multiples of {patch} times the VAE's spatial factor."
            )

    def _rotary(self, condition: Tensor) -> tuple[Tensor, Tensor] | None:
        """CogVideoX-5b's positions, as its pipeline makes them."""
        config = self.backbone.config
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        patch = config.patch_size
        grid = (condition.shape[3] // patch, condition.shape[4] // patch)
        base = config.sample_width // patch, config.sample_height // patch
        positions: Any = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, *base),
            grid_size=grid,
            temporal_size=condition.shape[2],
            device=condition.device,
        )
        return positions


def family_for(vae: Any) -> Family:
    """The family whose latents a VAE makes."""
    name = type(vae).__name__
    return "wan" if "Wan" in name or "Qwen" in name else "cogvideox"


def family_of(backbone: Any) -> Family:
    """Raises ValueError: a backbone of another class, or CogVideoX 1.5, whose patches span time."""
    if isinstance(backbone, WanTransformer3DModel):
        return "wan"
    if isinstance(backbone, CogVideoXTransformer3DModel):
        if cast(Any, backbone).config.patch_size_t is not None:
            raise ValueError("CogVideoX 1.5 cuts time into patches too, which is not supported: pass CogVideoX 1.0.")
        return "cogvideox"
    raise ValueError(
        f"The backbone is a {type(backbone).__name__}: pass a WanTransformer3DModel or CogVideoXTransformer3DModel."
    )


def fresh_backbone(
    family: Family, channels: int, latent_shape: tuple[int, int, int], width: int, layers: int, seed: int
) -> Any:
    """A small seeded backbone whose last layer is zero.

    Args:
        channels: of the latents.
        latent_shape: (latent frames, h, w), which CogVideoX's positions are made for.
        width: inner width, a multiple of 32.

    Raises:
        ValueError: a setting is out of range.
    """
    if width < 32 or width % 32 or layers < 1:
        raise ValueError(f"The backbone's width must be a multiple of 32 and layers at least 1, got {width}, {layers}.")
    heads = {"num_attention_heads": width // 32, "attention_head_dim": 32, "num_layers": layers}
    frames, height, across = latent_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any
        if family == "wan":
            backbone = WanTransformer3DModel(
                patch_size=(1, 1, 1), in_channels=channels, out_channels=channels, text_dim=TEXT_DIM, freq_dim=32,
                ffn_dim=4 * width, **heads,
            )  # fmt: skip
        else:
            backbone = CogVideoXTransformer3DModel(
                in_channels=channels, out_channels=channels, text_embed_dim=TEXT_DIM, time_embed_dim=width,
                patch_size=1, sample_height=height, sample_width=across, sample_frames=4 * (frames - 1) + 1,
                max_text_seq_length=TEXT_TOKENS, **heads,
            )  # fmt: skip
    for parameter in backbone.proj_out.parameters():
        nn.init.zeros_(parameter)
    return backbone


def pretrained_backbone(source: str, family: Family, lora_rank: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """(backbone, scheduler or None) of a published pipeline: a folder or a hub id.

    Args:
        source: a pipeline with ``transformer/`` in it, or the folder of a transformer alone.
        lora_rank: rank of the LoRA layers that train instead of the weights (peft); 0 trains all weights.

    Raises:
        ValueError: it cannot be loaded; the message says why.
    """
    cls: Any = WanTransformer3DModel if family == "wan" else CogVideoXTransformer3DModel
    folder = Path(source)
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"No folder '{folder.name}' for --pretrained: pass a pipeline's folder or a hub id.")
    inside = None if (folder / "config.json").is_file() else "transformer"
    try:
        backbone = cls.from_pretrained(source, subfolder=inside, torch_dtype=dtype)
        absent = [name for name, p in backbone.named_parameters() if p.is_meta]
        if absent:
            raise ValueError(f"its weights lack {len(absent)} of the model's tensors, the first is {absent[0]}.")
        scheduler = None
        if family == "cogvideox" and inside:
            scheduler = CogVideoXDDIMScheduler.from_pretrained(source, subfolder="scheduler")
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"No {cls.__name__} could be loaded from '{folder.name}': {reason}") from error
    if lora_rank:
        from peft import LoraConfig  # only here: it brings transformers along

        backbone.requires_grad_(False)
        backbone.add_adapter(
            LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian",
                       target_modules=LORA_TARGETS[family])
        )  # fmt: skip
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # what trains is kept in full precision
    return backbone, scheduler


def read_prompt(path: Path) -> Tensor:
    """The tensor ``prompt_embeds`` [1, tokens, width] of a safetensors file.

    Raises:
        ValueError: no such file, or no such tensor in it.
    """
    try:
        return load_file(path)["prompt_embeds"]
    except KeyError:
        raise ValueError(f"'{path.name}' has no tensor 'prompt_embeds' [1, tokens, width].") from None
    except Exception as error:  # safetensors has its own error class, and OSError
        raise ValueError(f"The prompt '{path.name}' cannot be read: {error}") from error
