"""Which rows of a data set a training step sees."""

from __future__ import annotations

from functools import lru_cache

import torch

from teachers.randomness import derive_seed


class ShuffledRows:
    """Rows in an order that is shuffled anew in every epoch; a pure function of seed, step and places."""

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.num_rows, generator=generator)

    def __call__(self, step: int, places: range) -> torch.Tensor:
        """The row (len(places),) at each place of the global batch."""
        positions = [divmod(step * self.batch_size + place, self.num_rows) for place in places]
        return torch.stack([self._order(epoch)[offset] for epoch, offset in positions])
