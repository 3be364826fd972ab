"""What an experiment starts from, as one hash: names alone do not tell whether an interrupted run may go on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def inputs_sha256(model: Any, files: Sequence[Path] = ()) -> str:
    """Hash of a model's weights, in the order of its state, and of files such as videos.

    Cost: one pass over all of them.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**24):
                digest.update(part)
    return digest.hexdigest()
