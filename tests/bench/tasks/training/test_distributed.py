"""DistributedDataParallel: gradients of the model that makes the latents are averaged; those of the decoder are not."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import chopgrad
from chopgrad import Chop
from tests.models import build, latents_for
from tests.processes import on_workers

WORKERS = 2


def gradients(rank, wrap):
    """(of the backbone, of the decoder) for one worker's clip."""
    vae = build("wan2.1")
    vae.decoder.requires_grad_(True)
    torch.manual_seed(0)
    backbone = nn.Conv3d(4, 4, 1, dtype=torch.float64)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 2, seed=rank)
    with torch.no_grad():
        target = torch.zeros_like(decoder.decode(z))
    model = DistributedDataParallel(backbone) if wrap else backbone
    chopgrad.frame_loss(decoder, model(z), target, F.mse_loss, Chop(1)).backward()
    return backbone.weight.grad, vae.decoder.conv_in.weight.grad


def worker(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    alone = [gradients(r, wrap=False) for r in range(WORKERS)]
    backbone, decoder = gradients(rank, wrap=True)
    assert not torch.allclose(alone[0][0], alone[1][0])
    torch.testing.assert_close(backbone, (alone[0][0] + alone[1][0]) / WORKERS)
    torch.testing.assert_close(decoder, alone[rank][1])  # nothing wraps the decoder: average it yourself
    distributed.all_reduce(decoder)
    torch.testing.assert_close(decoder / WORKERS, (alone[0][1] + alone[1][1]) / WORKERS)
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_workers(tmp_path):
    on_workers(worker, str(tmp_path / "store"), count=WORKERS)
