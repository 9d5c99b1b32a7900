"""A denoiser that answers the same whatever it is asked, and keeps what it was asked."""

from __future__ import annotations

import torch

from teachers.conditions.condition import ClassCondition, Condition
from teachers.guidance import GuidedDenoiser


def no_condition(num_samples: int) -> Condition:
    return ClassCondition(torch.zeros(num_samples, dtype=torch.long))


def masks(denoise: GuidedDenoiser, length: int) -> torch.Tensor:
    """Nothing but masks, (B, length)."""
    return torch.full((len(denoise.condition), length), denoise.mask_token_id)


class Recorder(GuidedDenoiser):
    """Logits (L, V) of every sample, and `seen`, the tokens (R, L) of each call."""

    mask_token_id = 9

    def __init__(self, logits: torch.Tensor, num_samples: int = 1):
        self.seen: list[torch.Tensor] = []

        def denoiser(tokens, condition):
            self.seen.append(tokens.clone())
            return logits.expand(len(tokens), *logits.shape)

        super().__init__(denoiser, no_condition(num_samples))
