"""Any loss, decoder, strategy and form: every gradient is that of ordinary back-propagation through ``vae.decode``.

Where a strategy truncates, the reference is ``PairwiseAdjoint``, which knows nothing of the engine.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import Chop, Exact, Full
from tests.brute_force import PairwiseAdjoint
from tests.models import VAES, build, latents_for

TOLERANCE = 1e-9


class Loss(nn.Module):
    """``loss(frames, target)``; its parameters need gradients too. It may see the VAE and the latents."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.latents = [vae], None

    def last_layer(self):
        conv_out = self.vae[0].decoder.conv_out
        return getattr(conv_out, "conv", conv_out).weight  # CogVideoX wraps its convolution


def convolutions(*channels):
    layers = [nn.Conv3d(a, b, 3, padding=1) for a, b in pairwise(channels)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.Tanh())][:-1])


class MeanSquared(Loss):
    def forward(self, frames, target):
        return F.mse_loss(frames, target)


class MeanAbsolute(Loss):
    def forward(self, frames, target):
        return F.l1_loss(frames, target)


class VideoEncoder(Loss):
    """A reward: attention between all frames of the clip."""

    def forward(self, frames, target):
        tokens = torch.cat([frames, target], dim=1).transpose(1, 2).flatten(2)
        mixed = (tokens @ tokens.transpose(1, 2) / tokens.shape[2] ** 0.5).softmax(-1) @ tokens
        return mixed.tanh().square().mean(1).sum()


class FarPairs(Loss):
    def forward(self, frames, target):
        return (frames[:, :, 0] - 2 * frames[:, :, -1]).square().mean() + (frames[:, :, -1] * target[:, :, 0]).mean()


class Gan(Loss):
    """Generator and discriminator trained by one sum: the first term is for both, the others for the second."""

    def __init__(self, vae):
        super().__init__(vae)
        self.discriminator = convolutions(3, 4, 1)

    def forward(self, frames, target):
        fake, real = self.discriminator(frames.detach()), self.discriminator(target)
        return F.softplus(-self.discriminator(frames)).mean() + F.softplus(fake).mean() + F.softplus(-real).mean()


class AdaptiveGan(Gan):
    """The weight of the adversarial term balances gradients at the decoder's last layer (VQGAN)."""

    def forward(self, frames, target):
        pixels, adversarial = F.mse_loss(frames, target), -self.discriminator(frames).mean()
        norms = [torch.autograd.grad(x, self.last_layer(), retain_graph=True)[0].norm() for x in (pixels, adversarial)]
        return pixels + (norms[0] / (norms[1] + 0.1)).detach() * adversarial


class GradientPenalty(Gan):
    """A penalty on the discriminator's slope at real and at decoded frames: a derivative inside the loss."""

    def forward(self, frames, target):
        real = target.detach().requires_grad_()
        slopes = [torch.autograd.grad(self.discriminator(x).sum(), x, create_graph=True)[0] for x in (frames, real)]
        return sum(slope.square().mean() for slope in slopes) - self.discriminator(frames).mean()


class Warp(Loss):
    """Frame t + 1 warped back to t by a flow that depends on the frames."""

    def forward(self, frames, target):
        following = frames.roll(-1, dims=2)
        flow = 0.1 * (frames[:, :2] * target[:, :2]).tanh()
        images, flow = (x.transpose(1, 2).flatten(0, 1) for x in (following, flow))
        still = torch.eye(2, 3, dtype=frames.dtype).expand(len(images), 2, 3)
        grid = F.affine_grid(still, images.shape, align_corners=False) + flow.permute(0, 2, 3, 1)
        warped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return (warped - frames.transpose(1, 2).flatten(0, 1)).square().mean()


class LearnedWeights(Loss):
    """Log-variances that weight the terms (Kendall et al.)."""

    def __init__(self, vae):
        super().__init__(vae)
        self.logs = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, frames, target):
        terms = torch.stack([F.mse_loss(frames, target), F.l1_loss(frames, target)])
        return ((-self.logs).exp() * terms + self.logs).sum()


class Refiner(Loss):
    """A network after the decoder."""

    def __init__(self, vae):
        super().__init__(vae)
        self.net = convolutions(3, 4, 3)

    def forward(self, frames, target):
        return F.mse_loss(frames + self.net(frames), target)


class LearnedTarget(Loss):
    def __init__(self, vae):
        super().__init__(vae)
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1))

    def forward(self, frames, target):
        return F.mse_loss(frames, self.gain * target)


class LatentsToo(Loss):
    """Latents and a weight of the decoder have a second way into the loss, beside the frames."""

    def forward(self, frames, target):
        beside = self.latents.tanh().mean() + self.last_layer().square().mean()
        return F.mse_loss(frames, target) * self.latents.square().mean() + beside


class InPlace(Loss):
    """What it is given is its own, to change."""

    def forward(self, frames, target):
        frames.mul_(0.5).sub_(0.1)
        return (frames.relu_() - target).abs().mean()


ZOO = [
    MeanSquared,
    MeanAbsolute,
    VideoEncoder,
    FarPairs,
    Gan,
    AdaptiveGan,
    GradientPenalty,
    Warp,
    LearnedWeights,
    Refiner,
    LearnedTarget,
    LatentsToo,
    InPlace,
]

exact = st.one_of(
    st.just(Full()),
    st.builds(Exact, offload=st.booleans(), every=st.none() | st.integers(1, 4), pieces=st.booleans()),
)
kept = st.builds(Chop, distance=st.integers(0, 5), block=st.integers(1, 6), offload=st.booleans())
rebuilt = st.builds(
    Chop,
    distance=st.integers(0, 5),
    block=st.integers(1, 6),
    recompute=st.just(True),
    offload=st.booleans(),
    pieces=st.booleans(),
)


@cache
def vae_of(name):
    return build(name)


@st.composite
def cases(draw):
    loss = draw(st.sampled_from(ZOO))
    trainable = "all" if loss is AdaptiveGan else draw(st.sampled_from(["none", "some", "all"]))
    return {
        "name": draw(st.sampled_from(list(VAES))),
        "latent_frames": draw(st.integers(1, 6)),
        "batch": draw(st.integers(1, 2)),
        "width": draw(st.integers(1, 2)),
        "trainable": trainable,
        "latents": draw(st.sampled_from(["leaf", "computed", *(["constant"] if trainable != "none" else [])])),
        "target_needs_grad": draw(st.booleans()),
        "clamp": draw(st.booleans()),
        "checkpoint": draw(st.sampled_from(["auto", None, "frame", "residual", "block"])),
        "strategy": draw(st.one_of(exact, kept, rebuilt)),
        "form": draw(st.sampled_from(["decode", "frame_loss", "patch"])),
        "loss": loss,
        "seed": draw(st.integers(0, 3)),
    }


def check(case):
    vae, strategy, clamp = vae_of(case["name"]), case["strategy"], case["clamp"]
    vae.requires_grad_(case["trainable"] == "all")
    if case["trainable"] == "some":
        vae.decoder.conv_in.requires_grad_(True)
    decoder = chopgrad.decoder_for(vae, clamp=clamp, checkpoint=case["checkpoint"], check=False)
    spans = decoder.frame_groups(case["latent_frames"])
    source = latents_for(vae, case["latent_frames"], case["batch"], 2, case["seed"])[..., : case["width"]]
    source.requires_grad_(case["latents"] != "constant")
    with torch.no_grad():
        shape = decoder.decode(source).shape
    torch.manual_seed(case["seed"])
    target = torch.randn(shape, dtype=torch.float64, requires_grad=case["target_needs_grad"])
    loss = case["loss"](vae).double()
    tensors = [source, target, *loss.parameters(), *vae.parameters()]
    tensors = [x for x in tensors if x.requires_grad]

    def of_frames(frames):
        """The loss of the whole video, or what ``frame_loss`` makes of it."""
        if case["form"] != "frame_loss":
            return loss(frames, target)
        # Copies: a loss that changes its frames would change those of other groups' version too.
        parts = [(frames[:, :, s.frames].clone(), target[:, :, s.frames], s.frame_count / shape[2]) for s in spans]
        return sum(loss(x, y) * weight for x, y, weight in parts)

    def plain(latents):
        if getattr(strategy, "block", len(spans)) + getattr(strategy, "distance", 0) < len(spans):
            return of_frames(PairwiseAdjoint.of(vae, latents, strategy, clamp))
        if clamp:
            return of_frames(vae.decode(latents).sample)
        return of_frames(chopgrad.decoder_for(vae, clamp=False, checkpoint=None, check=False).decode(latents))

    def ours(latents):
        if case["form"] == "frame_loss":
            return chopgrad.frame_loss(decoder, latents, target, loss, strategy)
        if case["form"] == "decode":
            return loss(chopgrad.decode(decoder, latents, strategy), target)
        with chopgrad.patch(vae, strategy, clamp=clamp, checkpoint=case["checkpoint"], check=False):
            return loss(vae.decode(latents).sample, target)

    results = []
    for differentiate in (plain, ours):
        loss.latents = source.sin() * 1.5 if case["latents"] == "computed" else source
        for x in tensors:
            x.grad = None
        value = differentiate(loss.latents)
        value.backward()
        results.append((value.detach(), [x.grad for x in tensors]))
    (expected, wanted), (value, found) = results
    torch.testing.assert_close(value, expected, rtol=TOLERANCE, atol=TOLERANCE)
    norms = [x.norm().item() for x in wanted if x is not None]
    for x, got, want in zip(tensors, found, wanted, strict=True):
        assert (got is None) == (want is None), x.shape
        if want is not None:
            assert (got - want).norm() <= TOLERANCE * max(want.norm().item(), 1e-3 * max(norms)), x.shape


relaxed = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.filterwarnings("ignore:.*parameters of the decoder", "ignore:The loss depends on tensors")
@given(case=cases())
@settings(max_examples=120, **relaxed)
def test_every_gradient_is_that_of_plain_back_propagation(case):
    check(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*parameters of the decoder", "ignore:The loss depends on tensors")
@given(case=cases())
@settings(max_examples=3000, **relaxed)
def test_three_thousand_more(case):
    check(case)
