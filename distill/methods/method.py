"""What a method is: how a student, and what helps it, learn from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from students.initialisation import TokenInitialiser
from teachers.conditions.condition import Condition
from teachers.denoiser import Denoiser


class Alarm(NamedTuple):
    """A metric, what it must not fall below or rise above, and what it means if it does."""

    metric: str
    lowest: float
    highest: float
    meaning: str


class Method:
    """Says which networks learn, from what they start, how, and what comes of it; one of them is the student.

    It knows no device, optimizer, process or checkpoint. To add one: a subclass in a file of its own, its name in
    `METHODS` (distill/methods/__init__.py).

    Attributes:
        config_class: a dataclass of its settings, the first of which is its `name`.
        title, reference, url, citation: what a model card says of it; the last is BibTeX.
        networks: those that learn, by name, as they start.
        optimizers: what AdamW is told of a network (its `lr`, `betas`, ...) where that is not what `training` says.
        averaged: the network whose averaged weights are measured and exported.
        updates: a training step, as a sequence of updates; an update names the networks that learn in it.
        alarms: what tells that it has gone wrong, of metrics that `losses` gives in every step that is measured.
    """

    config_class: ClassVar[type]
    title: ClassVar[str]
    reference: ClassVar[str]
    url: ClassVar[str]
    citation: ClassVar[str]

    networks: dict[str, Any]
    optimizers: dict[str, dict[str, Any]]
    averaged = "student"
    updates: tuple[tuple[str, ...], ...]
    alarms: Sequence[Alarm] = ()

    def __init__(
        self,
        config: Any,
        teacher: Denoiser,
        initialiser: TokenInitialiser,
        learner: Callable[[], Denoiser],
        compiled: bool = False,
    ):
        """With the frozen teacher, what draws initial tokens, and what makes a network that starts as the teacher.

        `compiled` has torch.compile work out what is done with logits; the networks are the caller's.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, config: Any, teacher: Denoiser) -> None:
        """A ValueError where this teacher cannot be distilled with these settings; called before anything is made."""

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        condition: Condition,
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of each network named in `update`, and metrics if this step is to be measured.

        `networks` are its own, as devices and processes have wrapped them. A loss may flow through networks that do not
        learn in this update: what gradients it leaves there are cleared. A metric is a mean, or (2,) the sum and the
        number of values.
        """
        raise NotImplementedError
