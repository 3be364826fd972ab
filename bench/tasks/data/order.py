"""The order of the clips: a function of seed and step, so that it needs no state and no memory of past steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Order(Sampler[list[int]]):
    """Rows of this process for one forward pass after another; each epoch is a fresh permutation.

    The batch is the same whatever the number of processes: each takes its share of it.

    Args:
        clips: how many there are.
        batch: clips a forward pass, over all processes.
        start, stop: forward passes, first and past the last.
        process, processes: this process's number and how many there are.

    Raises:
        ValueError: the batch cannot be shared equally.
    """

    def __init__(
        self, clips: int, batch: int, seed: int, start: int, stop: int, process: int = 0, processes: int = 1
    ) -> None:
        if batch % processes:
            raise ValueError(f"A batch of {batch} clips cannot be shared by {processes} processes: pass a multiple.")
        self.clips, self.batch, self.seed, self.start, self.stop = clips, batch, seed, start, stop
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield self.rows(step)[self.process :: self.processes]

    def rows(self, step: int) -> list[int]:
        """The whole batch of one forward pass."""
        chosen: list[int] = []
        place = step * self.batch
        while len(chosen) < self.batch:
            epoch, offset = divmod(place, self.clips)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            part = torch.randperm(self.clips, generator=generator)[offset : offset + self.batch - len(chosen)]
            chosen += part.tolist()
            place += len(part)
        return chosen
