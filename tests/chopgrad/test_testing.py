"""The conformance kit passes for every supported decoder, and each of its checks fails for a decoder that is wrong."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import chopgrad
from chopgrad import FrameGroup, testing
from chopgrad.decoders import WanDecoder
from chopgrad.encoders import WanEncoder
from chopgrad.recurrence import Recurrence
from chopgrad.testing import ConformanceError, check_decoder, check_encoder
from tests.models import VAES, build


@pytest.mark.parametrize("name", VAES)
def test_supported_decoders_conform(name):
    differences = check_decoder(chopgrad.decoder_for(build(name)))
    expected = {
        "forward", "longer sequence", "other height than width", "pieces", "samples", "exact gradient",
        "exact gradient of weights", "recomputation", "checkpoint", "normalisation", "streamed loss",
    }  # fmt: skip
    assert set(differences) == expected | ({"clamp"} if name != "cogvideox" else set())
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
    with pytest.raises(
        ConformanceError,
        match=r"^groups: LosesALatent: no number of video up to 256 runs in two groups. Mend latent_groups",
    ):
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
        return WanDecoder(self.vae, self.clamp, self.checkpoint).step(z, state)

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


class ClampsAlways(WanDecoder):
    def clamped(self, frames):
        return frames.clamp(-1, 1)


class NeverClamps(WanDecoder):
    def clamped(self, frames):
        return frames


class SwapsHeightAndWidth(WanDecoder):
    def blocks(self):
        def swapped(features, state):
            (x,), state = WanDecoder.blocks(self)[-1][0][0](features, state)
            return (x if x.shape[-1] == x.shape[-2] else x.flip(-1),), state

        return [*super().blocks()[:-1], [[swapped]]]


class TupleGroups(WanDecoder):
    def frame_groups(self, latent_frames):
        return [tuple(group) for group in super().frame_groups(latent_frames)]


class OneFrameEach(WanDecoder):
    def frame_groups(self, latent_frames):
        return [FrameGroup(slice(i, i + 1), slice(i, i + 1)) for i in range(latent_frames)]


class NoState(WanDecoder):
    def initial_state(self):
        return None


class FlatBlocks(WanDecoder):
    def blocks(self):
        return [piece for block in super().blocks() for unit in block for piece in unit]


class BarePieces(WanDecoder):
    def blocks(self):
        first, *others = super().blocks()

        def bare(features, state):
            (x,), state = first[0][0](features, state)
            return x, state

        return [[[bare]], *others]


class Nothing(WanDecoder):
    step, blocks = Recurrence.step, Recurrence.blocks


class NoParameters(WanDecoder):
    def modules(self):
        return []


class LeavesItOnModules(WanDecoder):
    """Its frames are wrong because it does, and that is told first."""

    def step(self, z, state):
        frames, state = super().step(z + getattr(self.vae, "left", 0), state)
        self.vae.left = frames.mean().detach()
        return frames, state


@pytest.mark.parametrize(
    ("wrong", "property_name"),
    [
        (ClampsAlways, "clamp: clamp=False changes nothing"),
        (NeverClamps, "(forward|clamp): "),
        (SwapsHeightAndWidth, "other height than width"),
        (TupleGroups, "form: frame_groups must return FrameGroup"),
        (OneFrameEach, "groups: OneFrameEach: the step that takes .* gives 2 frames or latents, but its group says 1"),
        (NoState, "form: initial_state.. must be a tuple of [0-9]+ slices"),
        (FlatBlocks, "form: blocks.. must return blocks, each a list of units"),
        (BarePieces, "form: piece 0 of blocks.. must return .features, state slice."),
        (Nothing, "form: there is neither blocks.. nor step"),
        (NoParameters, "parameters: there are none"),
        (LeavesItOnModules, "purity"),
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
        (WrongGroups, "groups: WrongGroups: the groups of 3 latents cover 2 of them. Mend frame_groups"),
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


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (OneFrameEach, "gives 2 frames or latents, but its group says 1"),
        (NoParameters, "has no parameters: let its modules.. return"),
        (WrongGroups, "cover 2 of them"),
    ],
)
def test_decoder_for_refuses_what_is_registered_and_wrong(wrong, sentence, monkeypatch):
    monkeypatch.setitem(chopgrad.DECODERS, "AutoencoderKLWan", wrong)
    if wrong is WrongGroups:
        monkeypatch.setattr(wrong, "frame_groups", lambda self, n: WanDecoder.frame_groups(self, n)[: max(1, n - 1)])
        sentence = "cover 2 of them"
    with pytest.raises(ValueError, match=sentence):
        chopgrad.decoder_for(build("wan2.1"))


def test_a_decoder_whose_frames_are_all_clamped_conforms():
    vae = build("wan2.1")
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(50.0)
    check_decoder(chopgrad.decoder_for(vae))


def test_in_half_precision_the_kit_is_not_to_be_trusted():
    with pytest.raises(ValueError, match=r"In torch.bfloat16 rounding hides a wrong cache"):
        check_decoder(WanDecoder(build("wan2.1", torch.bfloat16)))
