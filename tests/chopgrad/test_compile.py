"""torch.compile of the step: one whole graph per shape of group, and the same numbers."""

import pytest
import torch
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact
from tests.brute_force import relative_error
from tests.models import VAES, build, latents_for


@pytest.mark.slow
@pytest.mark.parametrize("name", VAES)
def test_a_compiled_step_is_one_graph_and_gives_the_same_gradient(name):
    torch._dynamo.reset()
    vae = build(name)
    decoder = chopgrad.decoder_for(vae)
    z = latents_for(vae, 12)
    target = torch.zeros_like(decoder.decode(z))

    def gradient(strategy):
        leaf = z.clone().requires_grad_()
        chopgrad.frame_loss(decoder, leaf, target, F.mse_loss, strategy).backward()
        return leaf.grad

    expected = [gradient(s) for s in (Exact(offload=False), Chop(1))]
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    decoder.step = torch.compile(decoder.step, dynamic=False, fullgraph=True, backend=backend)
    got = [gradient(s) for s in (Exact(offload=False), Chop(1))]
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-12
    # The first two groups have other shapes than the rest, and a graph with gradients is another one than without.
    assert len(graphs) <= 6
