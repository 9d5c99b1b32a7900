"""PUNT. Shapes: R samples, L tokens, V codebook size."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from teachers.randomness import Generators, rand
from teachers.samplers.maskgit import ORDERS
from teachers.samplers.sampler import (
    AdaptiveSampler,
    Evaluate,
    check_choice,
    check_range,
    descending_rank,
    draw,
)


class PUNTSampler(AdaptiveSampler):
    """Reveals the tokens that pass non-influence tests: parallel unmasking without dependence (arXiv 2510.21961).

    A token is drawn for every mask, once. The masks are ranked, the surest first, and in round b those whose rank has
    bit b set (most significant first) are tested: where the other candidates, the anchors, are filled in, their
    distributions must not move by more than epsilon. The tokens that pass every round are kept. A step costs one
    evaluation and at most ceil(log2 m) more for m masks.

    Confidence is the largest probability at a position, not that of the token drawn there: to keep likely draws and to
    draw unlikely ones again would sample another distribution than the denoiser's.

    Args:
        epsilon: the largest KL(before || with anchors), in nats, that counts as no influence.
        verify: test each kept token once more, with all those of a higher rank filled in: what the rounds cannot see is
            an influence of several together. Costs an evaluation for each kept token but one.
        order: of the ranks: the most confident first ("confidence", as published), or "random". A denoiser that learnt
            from random masks may know the states that confidence leads to less well.
    """

    @register_to_config
    def __init__(self, epsilon: float = 0.04, verify: bool = False, order: str = "confidence"):
        check_range("epsilon", epsilon, 0, above=True)
        check_choice("order", order, ORDERS)

    def step(self, evaluate: Evaluate, tokens: Tensor, masked: Tensor, generator: Generators) -> Tensor:
        before = evaluate(tokens).log_softmax(-1)
        candidates, _ = draw(before, masked, generator)
        if self.config.order == "confidence":
            score = before.amax(-1)
        else:
            score = rand(*tokens.shape, generator=generator, device=tokens.device)
        rank = descending_rank(score, masked)

        def test(kept: Tensor, anchors: Tensor, tests: Tensor) -> Tensor:
            """What is kept (R, L) without those tests that the anchors influence."""
            rows = (anchors.any(-1) & tests.any(-1)).nonzero().squeeze(-1)
            if len(rows) == 0:
                return kept
            filled = torch.where(anchors[rows], candidates[rows], tokens[rows])
            influence = kl_divergence(before[rows], evaluate(filled, rows).log_softmax(-1))
            influenced = tests[rows] & (influence > self.config.epsilon)
            return kept.index_copy(0, rows, kept[rows] & ~influenced)

        kept = masked
        for bit in reversed(range(int(masked.sum(-1).max() - 1).bit_length())):
            tests = kept & ((rank >> bit) & 1).bool()
            kept = test(kept, kept & ~tests, tests)
        if self.config.verify:
            rank = descending_rank(score, kept)
            for turn in range(1, int(kept.sum(-1).max())):
                kept = test(kept, kept & (rank < turn), kept & (rank == turn))
        return torch.where(kept, candidates, tokens)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities (..., V) -> (...); what p excludes counts nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum(-1)
