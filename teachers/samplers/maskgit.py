"""MaskGIT's parallel decoding. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators, rand
from teachers.samplers.sampler import (
    ScheduledSampler,
    check_choice,
    check_schedule,
    draw,
    gumbel_noise,
    highest,
    scheduled_num_masked,
)

ORDERS = ("confidence", "random")
DECAYS = ("linear", "constant")


class MaskGITSampler(ScheduledSampler):
    """MaskGIT's parallel decoding (arXiv 2202.04200): each step samples every masked token and keeps some of them.

    Args:
        num_inference_steps: network calls; no more than there are tokens.
        schedule: the share still masked after each step ("arccos", "cosine", "linear", "square").
        order: which samples to keep: the most confident ("confidence": log-probability plus Gumbel noise) or a
            uniformly random choice ("random").
        choice_temperature, choice_decay: the scale of that noise, and whether it fades out over the steps ("linear")
            or stays ("constant").
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 16,
        schedule: str = "arccos",
        order: str = "confidence",
        choice_temperature: float = 4.5,
        choice_decay: str = "linear",
    ):
        check_schedule(schedule)
        check_choice("order", order, ORDERS)
        check_choice("choice_decay", choice_decay, DECAYS)

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        config, num_positions = self.config, block.sum(-1)
        num_steps = min(num_steps, int(num_positions.max()))
        for step in range(num_steps):
            masked = block & (tokens == denoise.mask_token_id)
            sampled, probability = draw(denoise(tokens, step / max(num_steps - 1, 1)), masked, generator)
            if config.order == "confidence":
                scale = config.choice_temperature
                if config.choice_decay == "linear":
                    scale *= 1 - (step + 1) / num_steps
                score = probability.log() + scale * gumbel_noise(tokens, generator)
            else:
                score = rand(*tokens.shape, generator=generator, device=tokens.device)

            num_reveal = masked.sum(-1) - scheduled_num_masked(num_positions, config.schedule, step, num_steps)
            tokens = torch.where(highest(score, masked, num_reveal), sampled, tokens)
            tokens = denoise.end_step(tokens, num_steps - step - 1)
        return tokens
