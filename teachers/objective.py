"""The training objective of masked diffusion models. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from teachers.condition import Condition
from teachers.corruption import corrupt, scheduled_mask_ratio
from teachers.randomness import rand


def masked_cross_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    soft_targets: torch.Tensor | None = None,
    soft_weight: float = 0.5,
) -> torch.Tensor:
    """Cross-entropy of logits (B, L, V) with tokens (B, L) at masked positions, per token of the sequence.

    The sum over masked positions divided by B L, so that the mean over parts of a batch is that of the whole batch.
    With `soft_targets` (B, L, V), probabilities, the target is (1 - a) token + a soft target with a = `soft_weight`.
    """
    log_probabilities = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_probabilities.transpose(1, 2), tokens, reduction="none")
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean(-1)
    if soft_targets is not None:
        loss = (1 - soft_weight) * loss - soft_weight * (soft_targets * log_probabilities).sum(-1)
    return (loss * mask).sum() / mask.numel()


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
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of the denoiser, and metrics: cross-entropy and accuracy per masked token."""
        tokens, condition = batch
        draw = rand(len(tokens), 2, generator=generator, device=tokens.device)
        condition = condition.null(where=draw[:, 0] < self.label_dropout)
        mask_ratio = scheduled_mask_ratio(self.mask_schedule, draw[:, 1])
        corrupted, mask = corrupt(tokens, mask_ratio, self.mask_token_id, generator)

        logits = networks["denoiser"](corrupted, condition)
        loss = masked_cross_entropy(logits, tokens, mask, label_smoothing=self.label_smoothing)

        metrics = {
            "cross_entropy": torch.stack([loss.detach() * mask.numel(), mask.sum()]),
            "accuracy": torch.stack([((logits.argmax(-1) == tokens) & mask).sum(), mask.sum()]),
        }
        return {"denoiser": loss}, metrics
