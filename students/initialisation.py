"""What the one-step generator starts from: masks and random tokens, and a perturbation of their embeddings.

Section 4.3 of Di[M]O (arXiv 2503.15457). Shapes: B batch, L tokens, D hidden size, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from students.marginals import MarginalTable
from teachers.conditions.condition import Condition, Conditions
from teachers.corruption import random_mask
from teachers.pipeline import MAX_LOGITS, TokenPipeline, all_classes
from teachers.randomness import Generators, noise, rand, to_device

RANDOM_TOKENS = ("uniform", "marginal")
NOISE_SCALES = ("embedding", "unit")
MARK = 0.5  # the share of its direction in marked embeddings
MARGINAL_PROMPTS = 512
FORMER_TABLE = "cumulative_probabilities"  # of folders saved when all sums were kept, in float32


def perturb_embeddings(
    embeddings: torch.Tensor, noise: torch.Tensor, sigma: float, noise_scale: str = "embedding"
) -> torch.Tensor:
    """sqrt(1 - s^2) e + s c n for embeddings e and standard normal noise n, both (B, L, D).

    With `noise_scale="unit"` c is 1, as in the paper, which suits released teachers with embeddings of that size; with
    "embedding" c is the root mean square of each embedding, so that s is the noise's share whatever their size.
    """
    noise = noise.to(embeddings.dtype)
    if noise_scale == "embedding":
        noise = noise * embeddings.square().mean(-1, keepdim=True).sqrt()
    return math.sqrt(1 - sigma**2) * embeddings + sigma * noise


def mark(embeddings: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, L, D) of tokens, some of them (`where`, (B, L)) moved in a direction that never changes."""
    direction = noise(1, 1, embeddings.shape[-1], generator=[torch.Generator().manual_seed(0)])
    marked = perturb_embeddings(embeddings, to_device(direction, embeddings.device), MARK)
    return torch.where(where[..., None], marked, embeddings)


def teacher_marginals(teacher: TokenPipeline, conditions: Conditions) -> Iterator[torch.Tensor]:
    """The teacher's token probabilities (n, L, V) on a fully masked input, for some conditions after others: all of
    them, or of prompts as many as `MARGINAL_PROMPTS` that are spread over all.

    Without guidance and at temperature 1, however the teacher is distilled: the student's variety comes from the random
    tokens, and a sharpened distribution has less of it.
    """
    rows = torch.arange(len(conditions))
    if teacher.condition_kind == "text":
        rows = rows[:: -(-len(rows) // MARGINAL_PROMPTS)]
    for part in rows.split(max(1, min(64, MAX_LOGITS // (teacher.sequence_length * teacher.codebook_size)))):
        condition = conditions.condition(part, teacher.device)
        masks = torch.full((len(part), teacher.sequence_length), teacher.mask_token_id, device=teacher.device)
        with torch.no_grad():
            yield teacher.denoiser(masks, condition).float().softmax(-1)


class TokenInitialiser(ModelMixin, ConfigMixin):
    """Draws initial tokens: an exact share of them masked, the others random image tokens.

    The share is drawn uniformly from `mask_ratio` = (lowest, highest) for each sample. The random tokens are "uniform"
    over the codebook (the paper) or drawn from the teacher's "marginal": for the class, or, with `num_classes=0`, for
    prompts on the average or without any condition (see `teacher_marginals`).

    With `known_tokens`, the probability that some of a sample's tokens are known in distillation, the student learns to
    complete images; random tokens are marked then.
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
        known_tokens: float = 0.0,
    ):
        super().__init__()
        if random_tokens not in RANDOM_TOKENS:
            raise ValueError(f"random_tokens={random_tokens!r} is not known; choose from {', '.join(RANDOM_TOKENS)}")
        if noise_scale not in NOISE_SCALES:
            raise ValueError(f"noise_scale={noise_scale!r} is not known; choose from {', '.join(NOISE_SCALES)}")
        length = token_grid[0] * token_grid[1] if random_tokens == "marginal" else 0  # uniform tokens need no table
        self.marginals = MarginalTable(num_classes if length else 0, length, codebook_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings) -> Self:
        """As in diffusers; a folder that was saved with a whole table of sums opens too."""
        weights = Path(name) / SAFETENSORS_WEIGHTS_NAME
        state = load_file(weights) if weights.is_file() else {}
        if FORMER_TABLE not in state:
            return super().from_pretrained(name, **settings)
        initialiser = cls.from_config(cls.load_config(name))
        if initialiser.config.random_tokens == "marginal":
            initialiser.marginals.fill_from_sums(state[FORMER_TABLE])
        return initialiser.eval()

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
            initialiser.marginals.fill(teacher_marginals(teacher, conditions))
        return initialiser.to(teacher.device)

    def forward(
        self, condition: Condition, generator: Generators = None, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Initial tokens (B, L): those of `known` (B, L) where it has no mask."""
        tokens = self.random_tokens(condition, generator)
        lowest, highest = self.config.mask_ratio
        mask_ratio = lowest + (highest - lowest) * rand(len(tokens), 1, generator=generator, device=tokens.device)
        mask = random_mask(mask_ratio.squeeze(1), tokens.shape[1], generator)
        return self.keep(tokens.masked_fill(mask, self.config.mask_token_id), known)

    def keep(self, tokens: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B, L) with those of `known` (B, L) where it has no mask."""
        return tokens if known is None else torch.where(known == self.config.mask_token_id, tokens, known)

    def random_tokens(self, condition: Condition, generator: Generators = None) -> torch.Tensor:
        """Random image tokens (B, L)."""
        length = self.config.token_grid[0] * self.config.token_grid[1]
        uniform = rand(len(condition), length, generator=generator, device=condition.device)
        if self.config.random_tokens == "uniform":
            return (uniform * self.config.codebook_size).long()
        return self.marginals(condition.class_labels if self.config.num_classes else None, uniform)

    def perturb(self, embeddings: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """The embeddings (B, L, D) of the initial tokens with fresh noise of size `embedding_noise`."""
        drawn = noise(*embeddings.shape, generator=generator, device=embeddings.device)
        return perturb_embeddings(embeddings, drawn, self.config.embedding_noise, self.config.noise_scale)

    def perturbation(
        self, initial: torch.Tensor, known: torch.Tensor | None = None, generator: Generators = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What to hand to a denoiser as `perturb` beside initial tokens (B, L); None where embeddings stay as they are.

        `known` (B, L) is what they were made with.
        """
        if self.config.known_tokens == 0 and self.config.embedding_noise == 0:
            return None

        is_random = initial != self.config.mask_token_id
        if known is not None:
            is_random &= known == self.config.mask_token_id

        def perturb(embeddings: torch.Tensor) -> torch.Tensor:
            if self.config.known_tokens > 0:
                embeddings = mark(embeddings, is_random)  # so known tokens are read as the teacher reads them
            return self.perturb(embeddings, generator) if self.config.embedding_noise > 0 else embeddings

        return perturb
