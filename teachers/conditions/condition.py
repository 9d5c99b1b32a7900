"""What a denoiser is conditioned on. Shapes: B batch, N in all, T text tokens, E text width, P pooled width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from teachers.data import NO_CLASS
from teachers.randomness import to_device


class Condition:
    """A batch of conditions; each kind is a dataclass of tensors (or None) whose first dimension is the batch."""

    def __len__(self) -> int:
        return len(self._tensors()[0])

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda tensor: tensor.to(device))

    def select(self, index: torch.Tensor | slice) -> Self:
        """The rows named by an index, a slice or a boolean mask."""
        return self._map(lambda tensor: tensor[index])

    def null(self, where: torch.Tensor | None = None) -> Self:
        """The same batch without conditions: everywhere, or in the rows where `where` (B,) is True."""
        raise NotImplementedError

    @classmethod
    def concatenate(cls, conditions: Sequence[Condition]) -> Condition:
        columns = zip(*(condition._tensors() for condition in conditions), strict=True)
        return type(conditions[0])(*(None if column[0] is None else torch.cat(column) for column in columns))

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return type(self)(*(None if tensor is None else function(tensor) for tensor in self._tensors()))


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Class labels (B,) int64, `NO_CLASS` where there is none."""

    class_labels: torch.Tensor

    @classmethod
    def none(cls, batch_size: int, device: torch.device | str = "cpu") -> Self:
        """No condition at all: what unconditional models take."""
        return cls(torch.full((batch_size,), NO_CLASS, device=device))

    def null(self, where: torch.Tensor | None = None) -> Self:
        if where is None:
            where = torch.ones(len(self), dtype=torch.bool, device=self.device)
        return type(self)(self.class_labels.masked_fill(where, NO_CLASS))


@dataclass(frozen=True)
class TextCondition(Condition):
    """Encoded prompts: a text encoder's states (B, T, E) and pooled embedding (B, P), and micro-conditions (B, 5).

    The micro-conditions are width, height, crop's left and top, in pixels, and an aesthetic score. The `null_` ones are
    of the negative prompt (or the empty one), which stands for no condition; a one-step student does without.
    """

    states: torch.Tensor
    pooled: torch.Tensor
    micro_conditions: torch.Tensor
    null_states: torch.Tensor | None = None
    null_pooled: torch.Tensor | None = None

    def null(self, where: torch.Tensor | None = None) -> Self:
        assert self.null_states is not None
        assert self.null_pooled is not None
        if where is None:
            states, pooled = self.null_states, self.null_pooled
        else:
            states = torch.where(where[:, None, None], self.null_states, self.states)
            pooled = torch.where(where[:, None], self.null_pooled, self.pooled)
        return dataclasses.replace(self, states=states, pooled=pooled)


class Conditions(Protocol):
    """Conditions to draw from, by their rows (B,) on the CPU: class labels, or encoded prompts."""

    def __len__(self) -> int: ...

    def condition(self, rows: torch.Tensor, device: torch.device | str) -> Condition: ...


@dataclass(frozen=True)
class ClassLabels:
    """Class labels (N,), or `NO_CLASS`, as conditions to draw from."""

    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def condition(self, rows: torch.Tensor, device: torch.device | str) -> ClassCondition:
        return ClassCondition(to_device(self.labels[rows], torch.device(device)))
