"""The state of autocast, where a part of the forward pass is run again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Autocast:
    """The state of autocast, to be entered again where a step is run again."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        if device_type == "meta":
            return cls(device_type, False, None)
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def again(self) -> Any:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled)
