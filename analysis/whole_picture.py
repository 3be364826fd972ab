"""What does truncation in space cut that no distance keeps? ``python analysis/whole_picture.py``.

A control for ``analysis/spatial_truncation.py``, where the error of some losses hardly falls from two latent rows on,
although a pixel's gradient is local. Two parts of a decoder see the whole picture: CogVideoX's GroupNorm takes its
statistics over it, and the attention in the middle of Wan's decoder. Here the same errors are measured once more with
statistics and attention held fixed in the backward pass, of the exact gradient as well as of the truncated one. Frames
are the same. If the error then falls with the distance, it was these that it came through.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from analysis.real_clips import Crops, conclude, measure_crops, short_name
from analysis.settings import OnClips
from analysis.space.cut import CutDecode, errors
from chopgrad import CausalDecoder
from suite.bootstrap import mean_interval
from suite.claims import Claim, Verdict
from suite.command_line import run_main
from suite.printing import print_claims
from suite.records import Record
from suite.tables import with_interval
from suite.vaes import load_vae

STRIPS = 2
LEFT = 0.25
"""Of the error, at most, where it came through what sees the whole picture."""


@dataclass
class Config(OnClips):
    """Settings of the control."""

    full: bool = False
    """Larger crops."""
    seed: int = 0

    def crops(self, groups_of_eight: bool) -> Crops:
        return Crops(self.clips, 1, 9 if groups_of_eight else 5, (128, 32) if self.full else (32, 32), self.seed)

    @property
    def spaces(self) -> tuple[int, ...]:
        return (0, 2, 4) if self.full else (0, 1)


@contextmanager
def held_fixed() -> Iterator[list[str]]:
    """Statistics of GroupNorm and all that attention makes have no gradient; yields the names of what was called."""
    called: list[str] = []
    attention = F.scaled_dot_product_attention

    def group_norm(
        x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        called.append("group_norm")
        y = x.reshape(len(x), groups, -1)
        mean, variance = y.mean(-1, keepdim=True).detach(), y.var(-1, unbiased=False, keepdim=True).detach()
        y = ((y - mean) * (variance + eps).rsqrt()).reshape(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    def without_gradient(*args: Any, **kwargs: Any) -> Tensor:
        called.append("attention")
        return attention(*args, **kwargs).detach()

    # Modules with a hook are called as they are: of others the library runs a form of its own that keeps less.
    hook = register_module_forward_pre_hook(lambda *_: None)
    try:
        with (
            patch.object(F, "group_norm", group_norm),
            patch.object(F, "scaled_dot_product_attention", without_gradient),
        ):
            yield called
    finally:
        hook.remove()


def _errors(decoder: CausalDecoder, latents: Tensor, video: Tensor, spaces: tuple[int, ...]) -> dict[str, Any]:
    decode = CutDecode(decoder, latents)
    frames = decode.frames.detach().requires_grad_()
    adjoint = torch.autograd.grad(F.mse_loss(frames, video), frames)[0]
    exact = decode.gradient(adjoint)
    found = [errors(decode.gradient(adjoint, STRIPS, space), exact)["relative_error"] for space in spaces]
    return {"norm": exact.norm().item(), "relative_error": found}


def measure(config: Config) -> list[Record]:
    """One record for each decoder."""
    records = []
    for source in config.vaes:
        name, model = short_name(source), load_vae(source, config.device, subfolder=config.subfolder)

        def one(decoder: CausalDecoder, latents: Tensor, video: Tensor) -> dict[str, Any]:
            as_it_is = _errors(decoder, latents, video, config.spaces)
            with held_fixed() as called, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fixed = _errors(decoder, latents, video, config.spaces)
            if not called:
                raise ValueError("This decoder calls no group norm and no attention: there is nothing to hold fixed.")
            rows = latents.shape[-2]
            return {"latent_rows": rows, "as_it_is": as_it_is, "fixed": fixed, "held_fixed": sorted(set(called))}

        settings = {"full": config.full, "loss": "mse", "strips": STRIPS, "spaces": list(config.spaces)}
        path = config.folder / f"whole_picture-{name}.json"
        record = measure_crops(path, (source, model), config.crops("cog" in name.lower()), one, settings)
        summary = summarise(record.metrics["samples"])
        records.append(conclude(record, "errors", summary, claims(name, summary, config.spaces)))
    return records


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over clips with intervals, for each distance; and what is left of the error, at the largest."""
    clips = [s["clip"] for s in samples]
    errors_of = {who: [s[who]["relative_error"] for s in samples] for who in ("as_it_is", "fixed")}
    found: dict[str, Any] = {
        who: [list(mean_interval(of_space, clips)) for of_space in zip(*rows, strict=True)]
        for who, rows in errors_of.items()
    }
    ratios = [fixed[-1] / whole[-1] for fixed, whole in zip(errors_of["fixed"], errors_of["as_it_is"], strict=True)]
    rows, held = samples[0]["latent_rows"], samples[0]["held_fixed"]
    return found | {"left": list(mean_interval(ratios, clips)), "height": rows // STRIPS, "held_fixed": held}


def claims(name: str, summary: dict[str, Any], spaces: tuple[int, ...]) -> list[Claim]:
    _, low, high = summary["left"]
    verdict: Verdict = "holds" if high < LEFT else "fails" if low >= LEFT else "undecided"
    told = "; ".join(
        f"k={k} {with_interval(whole)}, fixed {with_interval(fixed, 4)}"
        for k, whole, fixed in zip(spaces, summary["as_it_is"], summary["fixed"], strict=True)
    )
    held = " and ".join(summary["held_fixed"]).replace("_", " ") or "nothing"
    return [
        Claim(
            f"What truncation in space cuts at k={spaces[-1]} came through parts that see the whole picture: held "
            f"fixed, they leave less than {100 * LEFT:.0f} % of its error ({name}).",
            "ours",
            verdict,
            f"film as target, MSE, strips of {summary['height']}, fixed: {held}; {told}; left "
            f"{with_interval(summary['left'])}",
        )
    ]


def main(config: Config) -> None:
    print_claims(measure(config))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
