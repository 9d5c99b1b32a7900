"""The Halton order. Shapes: B batch, L tokens."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from scipy.stats.qmc import Halton
from torch import Tensor

from teachers.corruption import scheduled_mask_ratio
from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators, rand
from teachers.samplers.sampler import ScheduledSampler, check_schedule, descending_rank, draw


class HaltonSampler(ScheduledSampler):
    """Reveals tokens in an order that spreads evenly over the grid (Halton-MaskGIT, arXiv 2503.17076).

    Args:
        token_grid: the grid's height and width, or the length of a sequence alone.
        num_inference_steps: network calls; no more than there are tokens.
        schedule: the share still masked after each step ("arccos", "cosine", "linear", "square").
        roll: start anywhere in the order, another one for each sample.
    """

    @register_to_config
    def __init__(
        self,
        token_grid: tuple[int, ...],
        num_inference_steps: int = 32,
        schedule: str = "arccos",
        roll: bool = True,
    ):
        check_schedule(schedule)
        self.rank = halton_order(tuple(token_grid)).argsort()  # (L,): when each position's turn comes

    def fill(
        self, denoise: GuidedDenoiser, tokens: Tensor, block: Tensor, num_steps: int, generator: Generators
    ) -> Tensor:
        batch_size, length = tokens.shape
        if length != len(self.rank):
            raise ValueError(f"a HaltonSampler for a grid of {self.config.token_grid} got {length} tokens")
        rank = self.rank.to(tokens.device).expand(batch_size, length)
        if self.config.roll:
            offset = rand(batch_size, 1, generator=generator, device=tokens.device) * length
            rank = (rank - offset.long()) % length
        turn = descending_rank(-rank.float(), block)
        num_positions = block.sum(-1)

        num_steps = min(num_steps, int(num_positions.max()))
        for step in range(num_steps):
            share = 1 - scheduled_mask_ratio(self.config.schedule, (step + 1) / num_steps)
            num_revealed = (num_positions * share + 1e-4).floor().clamp(min=step + 1)
            now = block & (tokens == denoise.mask_token_id) & (turn < num_revealed[:, None])
            sampled, _ = draw(denoise(tokens, step / max(num_steps - 1, 1)), now, generator)
            tokens = denoise.end_step(torch.where(now, sampled, tokens), num_steps - step - 1)
        return tokens


def halton_order(token_grid: tuple[int, ...]) -> Tensor:
    """The positions (L,) of a grid in the order in which the Halton sequence (bases 2, 3) first falls on them."""
    size = math.prod(token_grid)
    sequence = Halton(len(token_grid), scramble=False)
    sequence.fast_forward(1)  # the sequence's point 0 is the corner
    order: dict[int, None] = {}
    while len(order) < size:
        cells = (torch.from_numpy(sequence.random(size)) * torch.tensor(token_grid)).long()
        position = cells[:, 0]
        for axis in range(1, len(token_grid)):
            position = position * token_grid[axis] + cells[:, axis]
        order |= dict.fromkeys(position.tolist())
    return torch.tensor(list(order))
