"""What the one-step generator starts from: masks and random tokens, and a perturbation of their embeddings.

Section 4.3 of Di[M]O (arXiv 2503.15457). Shapes: B batch, L tokens, D hidden size, V codebook size.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from teachers.conditions.condition import Condition, Conditions
from teachers.corruption import random_mask
from teachers.pipeline import TokenPipeline, all_classes
from teachers.randomness import Generators, invert_cumulative, rand, randn

RANDOM_TOKENS = ("uniform", "marginal")
NOISE_SCALES = ("embedding", "unit")
MARGINAL_PROMPTS = 512


def perturb_embeddings(
    embeddings: torch.Tensor, noise: torch.Tensor, sigma: float, noise_scale: str = "embedding"
) -> torch.Tensor:
    """sqrt(1 - s^2) e + s c n for embeddings e and standard normal noise n, both (B, L, D).

    With `noise_scale="unit"` c is 1, as in the paper, which suits released teachers with embeddings of that size; with
    "embedding" c is the root mean square of each embedding, so that s is the noise's share whatever their size.
    """
    if noise_scale == "embedding":
        noise = noise * embeddings.square().mean(-1, keepdim=True).sqrt()
    return math.sqrt(1 - sigma**2) * embeddings + sigma * noise


@torch.no_grad()
def teacher_marginals(teacher: TokenPipeline, conditions: Conditions) -> torch.Tensor:
    """The teacher's token probabilities on a fully masked input: (num_classes, L, V) for each class, or (1, L, V), the
    mean over prompts: of these, as many as `MARGINAL_PROMPTS` that are spread over all; or of no condition."""
    rows = torch.arange(len(conditions))
    if teacher.condition_kind == "text":
        rows = rows[:: -(-len(rows) // MARGINAL_PROMPTS)]
    marginals = []
    for part in rows.split(64):
        condition = conditions.condition(part, teacher.device)
        masks = torch.full((len(part), teacher.sequence_length), teacher.mask_token_id, device=teacher.device)
        marginals.append(teacher.denoiser(masks, condition).float().softmax(-1))
    if teacher.condition_kind == "text":
        return torch.stack([part.sum(0) for part in marginals]).sum(0, keepdim=True) / len(rows)
    return torch.cat(marginals)


class TokenInitialiser(ModelMixin, ConfigMixin):
    """Draws initial tokens: an exact share of them masked, the others random image tokens.

    The share is drawn uniformly from `mask_ratio` = (lowest, highest) for each sample. The random tokens are "uniform"
    over the codebook (the paper) or drawn from the teacher's "marginal": for the class, or, with `num_classes=0`, for
    prompts on the average or without any condition (see `teacher_marginals`).
    """

    @register_to_config
    def __init__(
        self,
        token_grid: tuple[int, int],
        codebook_size: int,
        num_classes: int,
        mask_token_id: int,
        mask_ratio: tuple[float, float] = (0.6, 0.6),
        random_tokens: str = "uniform",
        embedding_noise: float = 0.0,
        noise_scale: str = "embedding",
    ):
        super().__init__()
        if random_tokens not in RANDOM_TOKENS:
            raise ValueError(f"random_tokens={random_tokens!r} is not known; choose from {', '.join(RANDOM_TOKENS)}")
        if noise_scale not in NOISE_SCALES:
            raise ValueError(f"noise_scale={noise_scale!r} is not known; choose from {', '.join(NOISE_SCALES)}")
        length = token_grid[0] * token_grid[1]
        # The sums along V, because that is what drawing needs. Uniform tokens need none.
        rows = (max(num_classes, 1), length) if random_tokens == "marginal" else (1, 1)
        uniform = torch.full((*rows, codebook_size), 1 / codebook_size)
        self.register_buffer("cumulative_probabilities", uniform.cumsum(-1))

    @classmethod
    def for_teacher(
        cls,
        teacher: TokenPipeline,
        random_tokens: str = "uniform",
        *,
        conditions: Conditions | None = None,
        **settings,
    ) -> TokenInitialiser:
        """With the teacher's tokens and, where asked for, its marginals: of each class, or over the prompts given."""
        initialiser = cls(
            teacher.token_grid,
            teacher.codebook_size,
            teacher.num_classes if teacher.condition_kind == "classes" else 0,
            teacher.mask_token_id,
            random_tokens=random_tokens,
            **settings,
        )
        if random_tokens == "marginal":
            conditions = all_classes(teacher) if conditions is None else conditions
            initialiser.cumulative_probabilities.copy_(teacher_marginals(teacher, conditions).cumsum(-1))
        return initialiser.to(teacher.device)

    def forward(self, condition: Condition, generator: Generators = None) -> torch.Tensor:
        """Initial tokens (B, L)."""
        tokens = self.random_tokens(condition, generator)
        lowest, highest = self.config.mask_ratio
        mask_ratio = lowest + (highest - lowest) * rand(len(tokens), 1, generator=generator, device=tokens.device)
        mask = random_mask(mask_ratio.squeeze(1), tokens.shape[1], generator)
        initial = tokens.masked_fill(mask, self.config.mask_token_id)
        return initial

    def random_tokens(self, condition: Condition, generator: Generators = None) -> torch.Tensor:
        """Random image tokens (B, L)."""
        length = self.config.token_grid[0] * self.config.token_grid[1]
        cumulative = self.cumulative_probabilities
        uniform = rand(len(condition), length, generator=generator, device=cumulative.device)
        if self.config.random_tokens == "uniform":
            return (uniform * self.config.codebook_size).long()
        if self.config.num_classes:
            return invert_cumulative(cumulative[condition.class_labels], uniform)
        by_position = uniform.T.contiguous() * cumulative[0, :, -1:]  # all share the probabilities of a position
        return torch.searchsorted(cumulative[0], by_position, right=True).T

    def perturb(self, embeddings: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """The embeddings (B, L, D) of the initial tokens with fresh noise of size `embedding_noise`."""
        noise = randn(*embeddings.shape, generator=generator, device=embeddings.device)
        return perturb_embeddings(embeddings, noise, self.config.embedding_noise, self.config.noise_scale)

    def perturbation(self, generator: Generators = None):
        """What to hand to a denoiser as `perturb`; None where there is no embedding noise."""
        return partial(self.perturb, generator=generator) if self.config.embedding_noise > 0 else None
