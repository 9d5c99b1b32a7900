"""The objective of masked diffusion models. Shapes: B batch, L tokens, M masked ones of the batch, V codebook size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from teachers.conditions.condition import Condition
from teachers.corruption import MASK_SCHEDULES, corrupt, scheduled_mask_ratio
from teachers.denoiser import Denoiser
from teachers.objectives.objective import Objective
from teachers.randomness import rand, to_device


def masked_cross_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    num_tokens: int,
    *,
    label_smoothing: float = 0.0,
    soft_targets: torch.Tensor | None = None,
    soft_weight: float = 0.5,
) -> torch.Tensor:
    """Cross-entropy of the logits (M, V) with the tokens (M,) of masked positions, per token of the sequences.

    The sum over `num_tokens` = B L, masked or not, so that the mean over parts of a batch is that of the whole batch.
    With `soft_targets` (M, V), probabilities, the target is (1 - a) token + a soft target with a = `soft_weight`.
    """
    loss = F.cross_entropy(logits.float(), tokens, label_smoothing=label_smoothing, reduction="sum")
    if soft_targets is not None:
        soft = F.cross_entropy(logits.float(), soft_targets, reduction="sum")
        loss = (1 - soft_weight) * loss + soft_weight * soft
    return loss / num_tokens


def sum_and_number(total: torch.Tensor, number: int) -> torch.Tensor:
    """A metric (2,) that is averaged over parts of a batch and over processes."""
    return torch.stack([total, torch.full_like(total, number)])


@dataclass
class MaskedConfig:
    """The masked diffusion objective."""

    name: str = field(default="masked", metadata={"help": "which objective"})
    mask_schedule: str = field(
        default="arccos", metadata={"help": "how the mask ratio is drawn: arccos, cosine, linear, square"}
    )
    label_dropout: float = field(
        default=0.1, metadata={"help": "share of samples trained without their condition, for guidance"}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "of the cross-entropy"})

    def __post_init__(self) -> None:
        if self.mask_schedule not in MASK_SCHEDULES:
            raise ValueError(f"objective.mask_schedule={self.mask_schedule!r}; choose from {', '.join(MASK_SCHEDULES)}")
        for name in ("label_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be in [0, 1]")


class MaskedObjective(Objective):
    """Mask at a scheduled ratio, predict what was masked (Eq. 3 of arXiv 2503.15457), of (tokens, condition)."""

    config_class = MaskedConfig

    def __init__(self, config: MaskedConfig, denoiser: Denoiser):
        self.config, self.mask_token_id = config, denoiser.mask_token_id
        self.networks = {"denoiser": denoiser}

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: tuple[torch.Tensor, Condition],
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of the denoiser, and if measured cross-entropy and accuracy per masked token."""
        config = self.config
        tokens, condition = batch
        draw = rand(len(tokens), 2, generator=generators)
        condition = condition.null(where=to_device(draw[:, 0] < config.label_dropout, tokens.device))
        mask_ratio = scheduled_mask_ratio(config.mask_schedule, draw[:, 1])
        corrupted, positions = corrupt(tokens, mask_ratio, self.mask_token_id, generators)
        masked_tokens = tokens.flatten()[positions]

        logits = networks["denoiser"](corrupted, condition, positions=positions)
        loss = masked_cross_entropy(logits, masked_tokens, tokens.numel(), label_smoothing=config.label_smoothing)

        metrics = {}
        if measured:
            metrics["cross_entropy"] = sum_and_number(loss * tokens.numel(), len(positions))
            metrics["accuracy"] = sum_and_number((logits.argmax(-1) == masked_tokens).sum(), len(positions))
        return {"denoiser": loss}, metrics
