"""The training objective of masked diffusion models. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from teachers.conditions.condition import Condition
from teachers.corruption import corrupt, scheduled_mask_ratio
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
    """Cross-entropy of the logits (M, V) with the tokens (M,) of masked places, per token of the sequences.

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


@dataclass(frozen=True)
class MaskedDiffusionObjective:
    """Teacher training: mask at a scheduled ratio, predict what was masked (Eq. 3 of arXiv 2503.15457).

    The batch is (tokens, condition); `updates` and `losses` are what the training loop asks of any method.
    """

    mask_token_id: int
    mask_schedule: str = "arccos"
    label_dropout: float = 0.1
    label_smoothing: float = 0.0

    updates = (("denoiser",),)

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: tuple[torch.Tensor, Condition],
        generator: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of the denoiser, and if measured cross-entropy and accuracy per masked token."""
        tokens, condition = batch
        draw = rand(len(tokens), 2, generator=generator)
        condition = condition.null(where=to_device(draw[:, 0] < self.label_dropout, tokens.device))
        mask_ratio = scheduled_mask_ratio(self.mask_schedule, draw[:, 1])
        corrupted, places = corrupt(tokens, mask_ratio, self.mask_token_id, generator)
        masked_tokens = tokens.flatten()[places]

        logits = networks["denoiser"](corrupted, condition, where=places)
        loss = masked_cross_entropy(logits, masked_tokens, tokens.numel(), label_smoothing=self.label_smoothing)

        metrics = {}
        if measured:
            metrics["cross_entropy"] = sum_and_number(loss * tokens.numel(), len(places))
            metrics["accuracy"] = sum_and_number((logits.argmax(-1) == masked_tokens).sum(), len(places))
        return {"denoiser": loss}, metrics
