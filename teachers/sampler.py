"""How a teacher turns masks into tokens in several steps. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from teachers.corruption import MASK_SCHEDULES, scheduled_mask_ratio
from teachers.randomness import Generators, rand, sample_tokens

ORDERS = ("confidence", "random")
RAMPS = ("constant", "linear")


class MaskGITSampler(SchedulerMixin, ConfigMixin):
    """MaskGIT's parallel decoding (arXiv 2202.04200): each step samples every masked token and keeps some of them.

    Args:
        num_inference_steps: network calls; never more than there are tokens.
        schedule: the share still masked after each step ("arccos", "cosine", "linear", "square").
        order: which samples to keep: the most confident ("confidence": log-probability plus Gumbel noise that fades
            out over the steps) or a uniformly random choice ("random").
        choice_temperature: the scale of that Gumbel noise.
        temperature, top_k, top_p: how tokens are drawn.
        guidance_scale, guidance_ramp: the default guidance, and whether it is "constant" or grows "linear" over steps.
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 16,
        schedule: str = "arccos",
        order: str = "confidence",
        choice_temperature: float = 4.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
    ):
        for name, value, known in [
            ("schedule", schedule, MASK_SCHEDULES),
            ("order", order, ORDERS),
            ("guidance_ramp", guidance_ramp, RAMPS),
        ]:
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(known)}")

    def __call__(
        self,
        denoise: Callable[[torch.Tensor, float], torch.Tensor],
        tokens: torch.Tensor,
        mask_token_id: int,
        *,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """Fill in the masked positions of tokens (B, L); the others stay as they are.

        `denoise(tokens, progress)` gives logits (B, L, V); progress runs from 0 at the first step to 1 at the last.
        """
        config = self.config
        temperature = config.temperature if temperature is None else temperature
        num_masked = (tokens == mask_token_id).sum(-1)  # (B,)
        num_steps = min(num_inference_steps or config.num_inference_steps, int(num_masked.max()))

        for step in range(num_steps):
            logits = denoise(tokens, step / max(num_steps - 1, 1))
            sampled = sample_tokens(logits, generator, temperature=temperature, top_k=config.top_k, top_p=config.top_p)
            masked = tokens == mask_token_id

            # What stays masked is as scheduled, but each step reveals a token and leaves one for each step after it.
            done = (step + 1) / num_steps
            scheduled = num_masked * scheduled_mask_ratio(config.schedule, done)
            scheduled = (scheduled + 1e-4).floor().long()  # 3 (1 - 1/3) is 2, whatever rounding says
            most = (num_masked - (step + 1)).clamp(min=0)
            num_reveal = masked.sum(-1) - scheduled.clamp(min=num_steps - (step + 1)).minimum(most)

            uniform = rand(*tokens.shape, generator=generator, device=tokens.device)
            if config.order == "confidence":
                log_probability = logits.float().log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
                gumbel = -(-uniform.clamp(min=1e-20).log()).log()
                score = log_probability + config.choice_temperature * (1 - done) * gumbel
            else:
                score = uniform
            rank = score.masked_fill(~masked, -torch.inf).argsort(-1, descending=True).argsort(-1)
            tokens = torch.where(masked & (rank < num_reveal[:, None]), sampled, tokens)
        return tokens
