"""The conformance kit passes for every supported decoder, and each of its checks fails for a decoder that is wrong."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import chopgrad
from chopgrad import testing
from chopgrad.decoders import WanDecoder
from chopgrad.encoders import WanEncoder
from chopgrad.testing import ConformanceError, check_decoder, check_encoder
from tests.models import VAES, build


@pytest.mark.parametrize("name", VAES)
def test_supported_decoders_conform(name):
    differences = check_decoder(chopgrad.decoder_for(build(name)))
    assert set(differences) == {
        "forward", "pieces", "samples", "exact gradient", "exact gradient of weights", "recomputation", "checkpoint",
        "normalisation", "streamed loss",
    }  # fmt: skip
    assert max(differences.values()) < 1e-12


@pytest.mark.parametrize("name", VAES)
def test_supported_encoders_conform(name):
    differences = check_encoder(chopgrad.encoder_for(build(name)))
    assert {"forward", "exact gradient", "exact gradient of weights", "checkpoint"} < set(differences)
    assert max(differences.values()) < 1e-12


class ForgetsWhatItSaw(WanEncoder):
    def step(self, x, state):
        moments, state = super().step(x, state)
        return moments, tree_map_only(torch.Tensor, torch.detach, state)


class LosesALatent(WanEncoder):
    def latent_groups(self, frames):
        return super().latent_groups(frames)[:1]


def test_a_wrong_encoder_is_caught():
    vae = build("wan2.1")
    with pytest.raises(ConformanceError, match=r"^exact gradient: with .* that of video differs.*mend step"):
        check_encoder(ForgetsWhatItSaw(vae))
    with pytest.raises(ConformanceError, match=r"^groups: .* mend latent_groups"):
        check_encoder(LosesALatent(vae), frames=5)


class ForgetsState(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        return frames, tree_map_only(torch.Tensor, torch.zeros_like, state)


class DetachesState(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        return frames, tree_map_only(torch.Tensor, torch.detach, state)


class ChangesItsState(WanDecoder):
    def step(self, z, state):
        for x in state:
            if isinstance(x, torch.Tensor) and not torch.is_grad_enabled():
                x.mul_(0.5)
        return super().step(z, state)


class KeepsTensors(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        self.vae.decoder.hidden_cache = [frames]
        return frames, state


class WrongGroups(WanDecoder):
    def frame_groups(self, latent_frames):
        groups = super().frame_groups(latent_frames)
        return groups[:-1] if latent_frames > 2 else groups


class WrongScale(WanDecoder):
    def denormalize(self, latents):
        return super().denormalize(latents) * 1.001


class OtherPieces(WanDecoder):
    """What its step does is right, and its pieces do something else."""

    def step(self, z, state):
        return WanDecoder(self.vae, checkpoint=self.checkpoint).step(z, state)

    def blocks(self):
        def doubled(features, state):
            features, state = WanDecoder.blocks(self)[-1][0][0](features, state)
            return (2 * features[0],), state

        return [*super().blocks()[:-1], [[doubled]]]


class LeavesWeightsOut(WanDecoder):
    def modules(self):
        return [self.vae.decoder]


class MixesSamples(WanDecoder):
    def blocks(self):
        def mixed(features, state):
            (x,), state = WanDecoder.blocks(self)[-1][0][0](features, state)
            return (x + 0.1 * (x - x.mean(0, keepdim=True)),), state

        return [*super().blocks()[:-1], [[mixed]]]

    def own_decode(self, latents):
        return self.decode(latents)


class CountsItsSteps(WanDecoder):
    def step(self, z, state):
        with torch.no_grad():
            self.vae.post_quant_conv.bias.add_(0)
        return super().step(z, state)


class WrongWhenRecomputed(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        return (0.5 * (frames + frames.detach()) if self.checkpoint == "residual" else frames), state


class DetachesAWeight(WanDecoder):
    def step(self, z, state):
        frames, state = super().step(z, state)
        extra = self.vae.post_quant_conv.bias.sum()
        return frames + (extra - extra.detach()), state


@pytest.mark.parametrize(
    ("wrong", "property_name"),
    [
        (OtherPieces, "pieces: step gives something else than blocks"),
        (LeavesWeightsOut, "parameters: post_quant_conv.weight, post_quant_conv.bias get a gradient"),
        (MixesSamples, "samples"),
        (CountsItsSteps, "purity: step changes 'post_quant_conv.bias'"),
        (WrongWhenRecomputed, "checkpoint: checkpoint='residual'"),
        (DetachesAWeight, "exact gradient of weights: .*post_quant_conv.bias"),
        (ForgetsState, "forward"),
        (DetachesState, "exact gradient"),
        (ChangesItsState, "(forward|purity)"),
        (KeepsTensors, "purity"),
        (WrongGroups, "groups: those of 3 latents cover 2 of them"),
        (WrongScale, "normalisation"),
    ],
)
def test_a_wrong_decoder_is_caught(wrong, property_name):
    with pytest.raises(ConformanceError, match=f"^({property_name})"):
        check_decoder(wrong(build("wan2.1")))


def test_a_tensor_with_the_id_of_one_that_is_gone_is_seen(monkeypatch):
    """As where memory that was freed is taken again at once: there every tensor on a module has the id of the last."""
    monkeypatch.setattr(testing, "id", lambda _: 0, raising=False)
    with pytest.raises(ConformanceError, match=r"^purity: step leaves tensors on the model's modules"):
        check_decoder(KeepsTensors(build("wan2.1")))
