"""Training-free self-correction. Shapes: B batch, L tokens, V codebook size."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators
from teachers.samplers.sampler import (
    ScheduledSampler,
    check_choice,
    check_range,
    check_schedule,
    draw,
    gumbel_noise,
    highest,
    log_probability,
    scheduled_num_masked,
)

SCORES = ("trajectory", "leave_one_out")
# The authors' 16, 8 and 4 tokens a step in the thirds of the window, of the 4,096 of their images.
PUBLISHED_FRACTIONS = (16 / 4096, 8 / 4096, 4 / 4096)


class SelfCorrectionSampler(ScheduledSampler):
    """MaskGIT's decoding that masks again the revealed tokens it has come to doubt (arXiv 2602.02927).

    Within a window of the steps, the revealed tokens of the lowest score are masked, and as many candidates more are
    revealed for them: the number of masks keeps to the plain schedule.

    Args:
        num_inference_steps, schedule, choice_temperature: as of MaskGIT; the noise fades out linearly.
        window: the part of the steps, from 0 to 1, in which tokens are masked again; never in the last step.
        fractions: the share of the tokens that a step masks again, in each of the equal parts of the window (the
            published ones are for 4,096 tokens: `PUBLISHED_FRACTIONS`); what is less than a token adds up over steps.
        score: of a revealed token: the mean of the probabilities that the forwards since then gave it where it stands
            ("trajectory", no evaluation more), or its probability with itself masked ("leave_one_out", an evaluation
            more for each revealed token, in the steps that mask).
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 16,
        schedule: str = "arccos",
        choice_temperature: float = 4.5,
        window: tuple[float, float] = (0.4, 1.0),
        fractions: tuple[float, ...] = (1 / 64, 1 / 128, 1 / 256),
        score: str = "trajectory",
    ):
        check_schedule(schedule)
        check_choice("score", score, SCORES)
        check_range("window's start", window[0], 0, 1)
        check_range("window's end", window[1], window[0], 1, above=True)
        if not fractions:
            raise ValueError("fractions=() must hold a number for at least one part of the window")
        for fraction in fractions:
            check_range("a fraction", fraction, 0, 1)

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        config, num_positions = self.config, block.sum(-1)
        total = torch.zeros_like(tokens, dtype=torch.float32)  # of the probabilities of each token since its reveal
        count = torch.zeros_like(tokens)
        due = torch.zeros_like(num_positions, dtype=torch.float32)

        num_steps = min(num_steps, int(num_positions.max()))
        for step in range(num_steps):
            progress = step / max(num_steps - 1, 1)
            logits = denoise(tokens, progress)
            masked = block & (tokens == denoise.mask_token_id)
            revealed = block & ~masked
            sampled, sampled_probability = draw(logits, masked, generator)
            num_masked = scheduled_num_masked(num_positions, config.schedule, step, num_steps)

            total, count = total.masked_fill(masked, 0), count.masked_fill(masked, 0)
            total[revealed] += log_probability(logits[revealed], tokens[revealed]).exp()
            count += revealed
            due = due + self.fraction(step, num_steps) * num_positions
            num_remask = (due + 1e-4).floor().long()
            due = due - num_remask
            num_remask = num_remask.minimum(num_masked).minimum(revealed.sum(-1))
            remask = torch.zeros_like(revealed)
            if num_remask.any():
                if config.score == "trajectory":
                    score = total / count.clamp(min=1)
                else:
                    score = leave_one_out(denoise, tokens, revealed, progress)
                remask = highest(-score, revealed, num_remask)

            noise = config.choice_temperature * (1 - (step + 1) / num_steps) * gumbel_noise(tokens, generator)
            num_reveal = masked.sum(-1) - num_masked + num_remask
            reveal = highest(sampled_probability.log() + noise, masked, num_reveal)
            tokens = torch.where(reveal, sampled, tokens).masked_fill(remask, denoise.mask_token_id)
            tokens = denoise.end_step(tokens, num_steps - step - 1)
        return tokens

    def fraction(self, step: int, num_steps: int) -> float:
        """The share of the tokens that a step should mask again."""
        start, end = self.config.window
        fractions, progress = self.config.fractions, step / num_steps
        if not start <= progress < end or step == num_steps - 1:
            return 0.0
        return fractions[int((progress - start) / (end - start) * len(fractions))]


def leave_one_out(denoise: GuidedDenoiser, tokens: Tensor, revealed: Tensor, progress: float) -> Tensor:
    """The log-probability (B, L) of each revealed token with it alone masked, an evaluation for each; else 0."""
    score = torch.zeros_like(tokens, dtype=torch.float32)
    turn = revealed.cumsum(-1) - 1
    for index in range(int(revealed.sum(-1).max())):
        left_out = revealed & (turn == index)
        rows = left_out.any(-1).nonzero().squeeze(-1)
        logits = denoise(tokens.masked_fill(left_out, denoise.mask_token_id)[rows], progress, rows)
        score[left_out] = log_probability(logits[left_out[rows]], tokens[left_out])
    return score
