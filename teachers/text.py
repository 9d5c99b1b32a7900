"""Masked language models as denoisers, so that the samplers fill in text. Shapes: B batch, L tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from teachers.conditions.condition import ClassCondition, Condition
from teachers.guidance import GuidedDenoiser
from teachers.randomness import Generators
from teachers.samplers.sampler import Sampler


class MaskedLanguageDenoiser(nn.Module):
    """A masked language model of transformers (`AutoModelForMaskedLM`): tokens (B, L) -> logits (B, L, V).

    V is the whole vocabulary, in which the special tokens are impossible. Padding is not attended to.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; a masked language model's is needed")
        self.model = model
        self.mask_token_id = tokenizer.mask_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self.register_buffer("special_tokens", torch.tensor(tokenizer.all_special_ids), persistent=False)

    def forward(self, tokens: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        attention_mask = torch.ones_like(tokens) if self.pad_token_id is None else (tokens != self.pad_token_id).long()
        logits = self.model(input_ids=tokens, attention_mask=attention_mask).logits
        return logits.index_fill(-1, self.special_tokens, -torch.inf)


@torch.no_grad()
def fill_in_text(
    denoiser: MaskedLanguageDenoiser,
    tokenizer: Any,
    texts: list[str],
    sampler: Sampler,
    *,
    num_inference_steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
) -> tuple[list[str], torch.Tensor]:
    """Texts whose mask tokens are filled in, the rest as given, and the network evaluations (B,) spent on each.

    To continue a prompt, append as many of `tokenizer.mask_token` as there shall be new tokens; with a block length
    they are filled in from left to right, a block at a time.
    """
    tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].to(denoiser.special_tokens.device)
    unconditional = ClassCondition.none(len(tokens), tokens.device)
    denoise = GuidedDenoiser(denoiser, unconditional, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = sampler(
        denoise,
        tokens,
        num_inference_steps=num_inference_steps,
        block_length=block_length,
        generator=generator,
    )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), denoise.nfe
