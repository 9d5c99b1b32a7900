"""What a denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_CLASS = -1


@dataclass(frozen=True)
class Condition:
    """A batch of conditions: class labels (B,) int64, `NO_CLASS` where there is none."""

    class_labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def device(self) -> torch.device:
        return self.class_labels.device

    def to(self, device: torch.device | str) -> Condition:
        return Condition(self.class_labels.to(device))

    def select(self, index: torch.Tensor | slice) -> Condition:
        """The rows named by an index, a slice or a boolean mask."""
        return Condition(self.class_labels[index])

    def null(self, where: torch.Tensor | None = None) -> Condition:
        """The same batch without conditions: everywhere, or in the rows where `where` (B,) is True."""
        if where is None:
            where = torch.ones(len(self), dtype=torch.bool, device=self.device)
        return Condition(self.class_labels.masked_fill(where, NO_CLASS))

    @staticmethod
    def concatenate(conditions: Sequence[Condition]) -> Condition:
        return Condition(torch.cat([condition.class_labels for condition in conditions]))
