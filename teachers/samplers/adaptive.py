"""Samplers that reveal as many tokens at once as the denoiser is sure of. Shapes: R samples, L tokens, V codebook."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from teachers.randomness import Generators, rand
from teachers.samplers.sampler import (
    AdaptiveSampler,
    Evaluate,
    check_range,
    descending_rank,
    draw,
    highest,
)


class ConfidenceThresholdSampler(AdaptiveSampler):
    """Reveals every position whose largest probability reaches the threshold, and always the surest (Fast-dLLM,
    arXiv 2505.22618).

    There tokens are drawn greedily; where they are not, to judge by the probability of the token drawn would sample
    another distribution than the denoiser's.
    """

    @register_to_config
    def __init__(self, threshold: float = 0.9):
        check_range("threshold", threshold, 0, 1, above=True)

    def step(self, evaluate: Evaluate, tokens: Tensor, masked: Tensor, generator: Generators) -> Tensor:
        logits = evaluate(tokens)
        sampled, _ = draw(logits, masked, generator)
        confidence = (logits.amax(-1) - logits.logsumexp(-1)).exp()
        sure = masked & (confidence >= self.config.threshold)
        reveal = sure | highest(confidence, masked, torch.ones_like(masked[:, 0], dtype=torch.long))
        return torch.where(reveal, sampled, tokens)


class EntropyBoundedSampler(AdaptiveSampler):
    """Reveals the most certain tokens while the entropies of all but the largest sum up to no more than the bound, in
    nats (EB-Sampler, arXiv 2505.24857): that sum bounds the error of drawing them independently."""

    @register_to_config
    def __init__(self, entropy_bound: float = 0.1):
        check_range("entropy_bound", entropy_bound, 0)

    def step(self, evaluate: Evaluate, tokens: Tensor, masked: Tensor, generator: Generators) -> Tensor:
        logits = evaluate(tokens)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).masked_fill(~masked, torch.inf)
        ascending, order = entropy.sort(dim=-1, stable=True)
        # The entropy before each in ascending order: the sum of a set without its largest. The first has none.
        before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending.cumsum(-1)[:, :-1]], dim=-1)
        reveal = masked & (before <= self.config.entropy_bound).gather(-1, order.argsort(-1))
        sampled, _ = draw(logits, reveal, generator)
        return torch.where(reveal, sampled, tokens)


class FirstHittingSampler(AdaptiveSampler):
    """Reveals one token at a time, at a position chosen uniformly: exact for the denoiser's any-order factorisation
    (arXiv 2409.02908), and the reference for all that reveal more.

    The times of the jumps are left out, since no denoiser here is conditioned on time.
    """

    @register_to_config
    def __init__(self):
        pass

    def step(self, evaluate: Evaluate, tokens: Tensor, masked: Tensor, generator: Generators) -> Tensor:
        chosen = descending_rank(rand(*tokens.shape, generator=generator, device=tokens.device), masked) == 0
        sampled, _ = draw(evaluate(tokens), chosen, generator)
        return torch.where(chosen, sampled, tokens)
