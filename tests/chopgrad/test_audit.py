"""The auditor: what it says of a right model, and that it sees each thing that is wrong."""

import json

import pytest
import torch
from torch import nn

import chopgrad
from chopgrad.__main__ import main
from chopgrad.audit import as_table, audit, is_broken, is_refused
from chopgrad.decoders import WanDecoder
from tests.models import build


class OtherPieces(WanDecoder):
    def step(self, z, state):
        return WanDecoder(self.vae, self.clamp).step(z, state)

    def blocks(self):
        def halved(features, state):
            features, state = WanDecoder.blocks(self)[-1][0][0](features, state)
            return (features[0] / 2,), state

        return [*super().blocks()[:-1], [[halved]]]


class LeavesWeightsOut(WanDecoder):
    def modules(self):
        return [self.vae.decoder]


@pytest.mark.parametrize(("wrong", "name"), [(OtherPieces, "by default"), (LeavesWeightsOut, "gradients of weights")])
def test_a_registered_decoder_that_is_wrong_by_pieces_or_in_its_weights_is_found(wrong, name, monkeypatch):
    monkeypatch.setitem(chopgrad.DECODERS, "AutoencoderKLWan", wrong)
    found = by_name(audit(build("wan2.1"), most_latents=3))
    assert found[name].verdict == "BROKEN"
    assert found["exact gradient"].verdict == "right"


def test_what_chopgrad_does_not_take_is_refused_and_not_broken():
    vae = build("wan2.1")
    vae.enable_tiling()
    found = audit(vae, most_latents=3)
    assert [x.verdict for x in found] == ["refused"]
    assert is_refused(found)
    assert "disable_tiling" in found[0].sentence


def test_weights_that_are_not_finite_are_told():
    vae = build("wan2.1")
    with torch.no_grad():
        vae.decoder.conv_in.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'decoder.conv_in.weight' has weights that are not finite"):
        audit(vae)


def by_name(findings):
    return {x.name: x for x in findings}


def test_nothing_of_a_right_model_is_broken_and_it_is_left_as_it_was():
    vae = build("wan2.1", torch.float32).requires_grad_(True)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    looked_at = []
    found = audit(vae, most_latents=30, said=looked_at.append)
    assert not is_broken(found)
    assert len(looked_at) == 6
    named = by_name(found)
    right = ["forward parity", "exact gradient", "by default", "gradients of weights", "streamed loss"]
    for name in (*right, "central differences"):
        assert named[name].verdict == "right"
    assert named["temporal receptive field, groups"].value == 25
    assert "does not support gradient checkpointing" in named["upstream checkpointing"].sentence
    assert 0 < named["truncation at D = 2"].value < named["truncation at D = 0"].value
    assert 0 < named["saturated pixels"].value < 1
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert next(vae.parameters()).requires_grad
    assert "| exact gradient | right |" in as_table(found)


def test_a_receptive_field_beyond_what_was_looked_at_is_said_to_be():
    named = by_name(audit(build("wan2.1"), most_latents=8))
    field = named["temporal receptive field, groups"]
    assert field.value == 7
    assert "longer than what was looked at" in field.sentence


def test_upstream_checkpointing_that_is_right_is_told():
    named = by_name(audit(build("cogvideox"), most_latents=4))
    assert named["upstream checkpointing"].verdict == "right"
    assert "% of what is saved without it" in named["upstream checkpointing"].sentence


def test_a_patched_model_is_looked_at_as_itself():
    vae = build("wan2.1")
    with chopgrad.patch(vae):
        assert not is_broken(audit(vae, most_latents=4))


class Rounds(nn.Module):
    """A convolution whose output is rounded, with a gradient as if it were not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *how):
        y = self.inner(*how)
        return y + (y.round(decimals=1) - y).detach()


def test_a_gradient_that_is_not_that_of_the_function_is_found():
    vae = build("wan2.1")
    vae.decoder.conv_in = Rounds(vae.decoder.conv_in)
    found = by_name(audit(vae, most_latents=3))
    assert found["central differences"].verdict == "BROKEN"
    assert found["exact gradient"].verdict == "right"


def test_a_hook_that_nobody_would_run_is_found():
    vae = build("wan2.1")
    vae.decoder.register_forward_hook(lambda module, how, y: 2 * y)
    found = audit(vae, most_latents=3)
    assert [x.verdict for x in found] == ["refused"]
    assert not is_broken(found)
    assert "a hook, a wrapper, an override" in found[0].sentence


def test_checkpointing_that_is_silently_wrong_or_does_nothing_is_found(monkeypatch):
    vae = build("cogvideox")
    cls = type(vae)

    def wrong(self):
        self.decoder.conv_out.register_forward_hook(lambda module, how, y: (y[0] * y[0].detach(), y[1]))

    monkeypatch.setattr(cls, "enable_gradient_checkpointing", wrong)
    found = by_name(audit(vae, most_latents=3))["upstream checkpointing"]
    assert found.verdict == "BROKEN"
    assert "silently wrong" in found.sentence
    monkeypatch.setattr(cls, "enable_gradient_checkpointing", lambda self: None)
    found = by_name(audit(build("cogvideox"), most_latents=3))["upstream checkpointing"]
    assert (found.verdict, found.value) == ("note", 0)
    assert "does nothing" in found.sentence


def test_tensors_that_a_decode_leaves_are_counted(monkeypatch):
    vae = build("wan2.1")
    clear = type(vae).clear_cache

    def leaves_two(self):
        clear(self)
        self.decoder.kept = [torch.zeros(1), torch.zeros(1)]

    monkeypatch.setattr(type(vae), "clear_cache", leaves_two)
    assert by_name(audit(vae, most_latents=3))["tensors left behind"].value == 2


def test_the_command(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "vae"
    build("wan2.1", torch.float32).save_pretrained(folder)
    assert main(["audit", "--vae", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["broken"]
    assert answer["findings"][0]["name"] == "hooks and overrides"
    assert main(["audit", "--vae", str(tmp_path), "--size", "1"]) == 2
    assert main(["audit", "--vae", str(tmp_path)]) == 2
    assert "No config was found" in capsys.readouterr().err
    assert main(["audit", "--vae", str(folder), "--call", "enable_tiling"]) == 2
    assert "Refused as it is" in capsys.readouterr().out
    assert main(["audit", "--vae", str(folder), "--call", "enable_tiling", "--set", "use_tiling=false", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["broken"]
    for how, sentence in ((["--set", "tiles=1"], "has no 'tiles'"), (["--set", "use_tiling=no"], "must be JSON")):
        assert main(["audit", "--vae", str(folder), *how]) == 2
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr("chopgrad.audit.EXACT", -1.0)
    assert main(["audit", "--vae", str(folder)]) == 1
    assert "Broken: forward parity, exact gradient, by default" in capsys.readouterr().out
