"""ReMDM. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from teachers.corruption import scheduled_mask_ratio
from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators, rand
from teachers.samplers.sampler import Sampler, check_choice, check_range, check_schedule, draw

STRATEGIES = ("cap", "rescale")


class ReMDMSampler(Sampler):
    """Ancestral sampling in which revealed tokens may be masked again (ReMDM, arXiv 2503.00307).

    From a share a of revealed tokens to a share b of them, a revealed token is masked with probability s, and a masked
    one revealed with probability (b - (1 - s) a) / (1 - a): the expected share is as scheduled, whatever s is.

    Args:
        num_inference_steps: network calls; may be more than there are tokens.
        schedule: the share still masked after each step ("arccos", "cosine", "linear", "square").
        strategy: s is min(eta, most) ("cap") or eta most ("rescale"), most = min(1, (1 - b) / a) being all it can be.
        eta: 0 is plain ancestral sampling.
    """

    @register_to_config
    def __init__(
        self, num_inference_steps: int = 32, schedule: str = "cosine", strategy: str = "rescale", eta: float = 0.1
    ):
        check_schedule(schedule)
        check_choice("strategy", strategy, STRATEGIES)
        check_range("eta", eta, 0, 1)

    def num_steps(self, num_inference_steps: int | None, length: int) -> int:
        num_steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_range("num_inference_steps", num_steps, 1)
        if num_steps != int(num_steps):
            raise ValueError(f"num_inference_steps={num_steps} must be whole")
        return int(num_steps)

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        config = self.config
        shares = [1 - scheduled_mask_ratio(config.schedule, step / num_steps).item() for step in range(num_steps + 1)]
        shares[0], shares[-1] = 0.0, 1.0  # whatever rounding says
        for step, (now, then) in enumerate(pairwise(shares)):
            most = min(1.0, (1 - then) / now) if now > 0 else 1.0
            remask_probability = min(config.eta, most) if config.strategy == "cap" else config.eta * most
            reveal_probability = (then - (1 - remask_probability) * now) / (1 - now)

            masked = block & (tokens == denoise.mask_token_id)
            sampled, _ = draw(denoise(tokens, step / max(num_steps - 1, 1)), masked, generator)
            uniform = rand(*tokens.shape, generator=generator, device=tokens.device)
            reveal = masked & (uniform < reveal_probability)
            remask = block & ~masked & (uniform < remask_probability)
            tokens = torch.where(reveal, sampled, tokens).masked_fill(remask, denoise.mask_token_id)
            tokens = denoise.end_step(tokens, num_steps - step - 1)
        return tokens
