"""A joint distribution small enough to know exactly, and its conditionals as a denoiser."""

from __future__ import annotations

import itertools
from functools import reduce

import torch
from torch import nn

from teachers.conditions.condition import Condition

LENGTH, CODEBOOK_SIZE = 5, 3
MODES = ((0, 1, 2, 0, 1), (1, 2, 0, 1, 2), (2, 0, 1, 2, 0), (0, 0, 2, 2, 1))
NOISE = 0.05


def states() -> torch.Tensor:
    """All token sequences, (V^L, L)."""
    return torch.tensor(list(itertools.product(range(CODEBOOK_SIZE), repeat=LENGTH)))


def joint() -> torch.Tensor:
    """The probability of each state: one of four modes, each token of it replaced by a random one with p = NOISE."""
    probability = torch.zeros(CODEBOOK_SIZE**LENGTH)
    for mode in MODES:
        same = states() == torch.tensor(mode)
        probability += torch.where(same, 1 - NOISE + NOISE / CODEBOOK_SIZE, NOISE / CODEBOOK_SIZE).prod(-1)
    return probability / probability.sum()


def state_index(tokens: torch.Tensor) -> torch.Tensor:
    return reduce(lambda index, column: index * CODEBOOK_SIZE + column, tokens.unbind(-1))


def histogram(tokens: torch.Tensor) -> torch.Tensor:
    """How often each state occurs among tokens (N, L)."""
    return torch.bincount(state_index(tokens), minlength=CODEBOOK_SIZE**LENGTH) / len(tokens)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def product_of_marginals() -> torch.Tensor:
    probability, all_states = joint(), states()
    product = torch.ones_like(probability)
    for position in range(LENGTH):
        marginal = torch.bincount(all_states[:, position], weights=probability)
        product *= marginal[all_states[:, position]]
    return product


class ExactDenoiser(nn.Module):
    """The joint's exact conditionals: logits (B, L, V) of each token given the tokens that are not masked."""

    mask_token_id = CODEBOOK_SIZE

    def __init__(self):
        super().__init__()
        self.num_calls = 0
        self.register_buffer("states", states())
        self.register_buffer("joint", joint())
        self.register_buffer("one_hot", nn.functional.one_hot(states(), CODEBOOK_SIZE).float())

    def forward(self, tokens: torch.Tensor, condition: Condition, perturb=None, positions=None) -> torch.Tensor:
        self.num_calls += 1
        agrees = (tokens[:, None] == self.states) | (tokens[:, None] == self.mask_token_id)
        weights = agrees.all(-1) * self.joint  # (B, V^L)
        logits = torch.einsum("bs,slv->blv", weights, self.one_hot).clamp(min=1e-12).log()
        return logits if positions is None else logits.flatten(0, 1)[positions]


class PairDenoiser(nn.Module):
    """Independent pairs of neighbouring tokens, the second a copy of the first with p = SAME: logits (B, L, V)."""

    mask_token_id = CODEBOOK_SIZE
    SAME = 0.9

    def forward(self, tokens: torch.Tensor, condition: Condition, perturb=None, positions=None) -> torch.Tensor:
        partner = tokens.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        other = (1 - self.SAME) / (CODEBOOK_SIZE - 1)
        conditional = torch.full((CODEBOOK_SIZE + 1, CODEBOOK_SIZE), other)
        conditional.fill_diagonal_(self.SAME)
        conditional[CODEBOOK_SIZE] = 1 / CODEBOOK_SIZE
        return conditional.log()[partner]

    @classmethod
    def joint(cls) -> torch.Tensor:
        """The probability of each pair, (V V,)."""
        table = torch.full((CODEBOOK_SIZE, CODEBOOK_SIZE), (1 - cls.SAME) / (CODEBOOK_SIZE - 1))
        return table.fill_diagonal_(cls.SAME).flatten() / CODEBOOK_SIZE
