"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import nn

from teachers.condition import Condition


def guide(denoiser: nn.Module, tokens: torch.Tensor, condition: Condition, guidance_scale: float) -> torch.Tensor:
    """Guided logits u + s (c - u) (B, L, V) from one concatenated forward; s = 1 is the plain conditional forward."""
    if guidance_scale == 1:
        return denoiser(tokens, condition)
    both = Condition.concatenate([condition, condition.null()])
    conditional, unconditional = denoiser(torch.cat([tokens, tokens]), both).chunk(2)
    return torch.lerp(unconditional, conditional, guidance_scale)


class GuidedDenoiser:
    """What a sampler calls: tokens and progress in, guided logits out, evaluations counted.

    `nfe` counts network evaluations per sample; a guided one counts twice. A ramp "linear" goes from no guidance at
    progress 0 to `guidance_scale` at progress 1, as MaskGIT samplers do; "constant" stays at it.
    """

    def __init__(self, denoiser: nn.Module, condition: Condition, guidance_scale: float, ramp: str = "constant"):
        self.denoiser = denoiser
        self.condition = condition
        self.guidance_scale = guidance_scale
        self.ramp = ramp
        self.nfe = 0

    def __call__(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        scale = self.guidance_scale
        if self.ramp == "linear":
            scale = 1 + (scale - 1) * progress
        self.nfe += 1 if scale == 1 else 2
        return guide(self.denoiser, tokens, self.condition, scale)
