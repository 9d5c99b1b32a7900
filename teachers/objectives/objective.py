"""What an objective is: what a teacher, or a tokenizer, learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from teachers.denoiser import Denoiser


class Objective:
    """Says which networks learn and from which losses; a masked diffusion teacher's has the `denoiser` among them.

    It knows no device, optimizer, process or checkpoint. To add one of teachers: a subclass in a file of its own, its
    name in `OBJECTIVES` (teachers/objectives/__init__.py).

    Attributes:
        config_class: a dataclass of its settings; where a job chooses it by name, with that `name`.
        networks: those that learn, by name, as they start.
        optimizers: what AdamW is told of a network (its `lr`, `betas`, ...) where that is not what `training` says.
        averaged: the network whose averaged weights are measured and saved.
        updates: a training step, as a sequence of updates; an update names the networks that learn in it.
        alarms: metrics of every step that is measured, what they must not fall below and not rise above, and what it
            means if they do.
    """

    config_class: ClassVar[type]

    networks: dict[str, Any]
    optimizers: Mapping[str, dict[str, Any]] = {}
    averaged = "denoiser"
    updates: tuple[tuple[str, ...], ...] = (("denoiser",),)
    alarms: tuple[tuple[str, float, float, str], ...] = ()

    def __init__(self, config: Any, denoiser: Denoiser):
        raise NotImplementedError

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: Any,
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of each network named in `update`, and metrics if this step is to be measured.

        `networks` are its own, as devices and processes have wrapped them. A metric is a mean, or (2,) the sum and the
        number of values.
        """
        raise NotImplementedError
