"""The hash of what an experiment starts from: the same for the same inputs, another for any change of them."""

import hashlib

import pytest
import torch
from torch import nn

from suite.fingerprint import inputs_sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_files_decide(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(dtype)  # with an integer counter among its buffers
    film = tmp_path / "a.mp4"
    film.write_bytes(b"film")
    first = inputs_sha256(model, [film])
    assert first == inputs_sha256(model, [film]) != inputs_sha256(model)
    weights = [bytes(t.detach().reshape(-1).view(torch.uint8).tolist()) for t in model.state_dict().values()]
    assert first == hashlib.sha256(b"".join(weights) + b"film").hexdigest()
    film.write_bytes(b"other")
    assert inputs_sha256(model, [film]) != first
    film.write_bytes(b"film")
    with torch.no_grad():
        model[1].running_mean[2] += 1
    assert inputs_sha256(model, [film]) != first
