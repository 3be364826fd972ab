"""Snippets of the pages run as pasted, each alone: what the reader has is given, imports are not."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from suite.records import ROOT
from tests.models import build, latents_for

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(text, id=f"{path.name}-{k}")
    for path in PAGES
    if path.name != "api.md"  # signatures
    for k, text in enumerate(FENCE.findall(path.read_text()))
]


def of_the_reader():
    """What stands in a training loop before a line of ours."""
    vae = build("wan2.1", torch.float32)
    latents = latents_for(vae, 3, size=8).float().requires_grad_()
    with torch.no_grad():
        video = torch.rand_like(vae.decode(latents).sample) * 2 - 1
    return {
        "pipe": SimpleNamespace(vae=vae),
        "vae": vae,
        "latents": latents,
        "predicted_latents": latents,
        "video": video,
        "reward_model": lambda frames: frames.square().mean(),
        "encoder": chopgrad.encoder_for(vae),
        "decoder": chopgrad.decoder_for(vae),
        "loss_fn": F.mse_loss,
        "kl_weight": 1e-6,
        "device": "cpu",
    }


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_snippet_runs_as_pasted(text, monkeypatch):
    if "lpips" in text:
        lpips = pytest.importorskip("lpips")
        real = lpips.LPIPS  # whose own weights would be downloaded
        monkeypatch.setattr(lpips, "LPIPS", lambda net: real(net=net, pretrained=False, pnet_rand=True, verbose=False))
    if "donated_buffer" in text:
        import torch._functorch.config as config

        monkeypatch.setattr(config, "donated_buffer", config.donated_buffer)
        monkeypatch.setattr(torch.compiler.config, "cache_key_tag", torch.compiler.config.cache_key_tag)
    given = of_the_reader()
    latents = given["latents"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(compile(text, "a snippet", "exec"), given)
    loss = given.get("loss")
    if loss is not None:
        assert loss.ndim == 0 and torch.isfinite(loss)
        if latents.grad is None:
            loss.backward()
        assert latents.grad is not None and latents.grad.norm() > 0


def test_there_are_snippets():
    assert len(SNIPPETS) >= 7
