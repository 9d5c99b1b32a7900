"""What a network has to be to serve as teacher, student or auxiliary.

Shapes: B batch, L tokens, M positions, D hidden size, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import nn

from teachers.conditions.condition import Condition

ConditionKind = Literal["classes", "text", "none"]
TokenKind = Literal["categorical"]


class Denoiser(Protocol):
    """Tokens, `mask_token_id` where masked, and a condition -> logits of the clean tokens; a `ModelMixin` of diffusers.

    It says in its own words what it is conditioned on and what its tokens are. Conditioned on "classes" its config has
    `num_classes`; on "text" it has `text_sizes`, the widths of the text encoder's states and of its pooled embedding;
    on "none" it takes no notice of what it is given.
    """

    config: Any  # with `token_grid` (h, w)
    mask_token_id: int
    condition_kind: ConditionKind
    token_kind: TokenKind

    def __call__(
        self,
        tokens: torch.Tensor,
        condition: Condition,
        perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V) for tokens (B, L) int64, or for their embeddings (B, L, D) in place of them.

        `perturb` maps the embeddings before positions are added. With `positions` (M,), counted through the batch as
        b L + l, only their logits (M, V) are computed.
        """
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> embeddings (B, L, D): the way in for gradients."""
        ...

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The blocks: what gradient checkpointing recomputes and adapters lie in."""
        ...

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What distillation may keep fixed: the embeddings, and an output layer that is tied to them."""
        ...

    def __getattr__(self, name: str) -> Any:
        """All that a `ModelMixin` has."""
        ...


WORDS = ("mask_token_id", "condition_kind", "token_kind", "embed", "layers", "embedding_parameters")


def check_denoiser(network: Any) -> None:
    """A ValueError where a network does not say of itself what a denoiser has to say."""
    if missing := [word for word in WORDS if not hasattr(network, word)]:
        raise ValueError(f"{type(network).__name__} is no denoiser: it lacks {', '.join(missing)} (docs/guide.md)")
