"""What the loop asks of what it trains: a method of distillation, or the objective of a teacher or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Task(Protocol):
    """Networks that learn, and their losses; distill/methods/method.py says what each attribute is."""

    networks: dict[str, Any]

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]: ...

    @property
    def averaged(self) -> str: ...

    @property
    def optimizers(self) -> Mapping[str, dict[str, Any]]: ...

    @property
    def alarms(self) -> Sequence[tuple[str, float, float, str]]: ...

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: Any,
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]: ...
