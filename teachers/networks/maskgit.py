"""The MaskGIT transformer: a bidirectional, class-conditional denoiser (arXiv 2202.04200).

The layout is that of the public PyTorch MaskGIT: the class token comes last, the output layer is tied to the token
embeddings and has a bias per position. Shapes: B batch, L tokens, D hidden size, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from teachers.conditions.condition import Condition
from teachers.denoiser import ConditionKind
from teachers.networks.output import project_to_codebook


class MaskGITTransformer(ModelMixin, ConfigMixin):
    """Tokens (B, L), `mask_token_id` where masked, and class labels -> logits (B, L, V) for the clean tokens.

    With `num_classes=0` it is unconditional.
    """

    token_kind: ClassVar = "categorical"

    _no_split_modules: ClassVar = ["BasicTransformerBlock"]  # what FSDP2 shards by itself
    _repeated_blocks: ClassVar = _no_split_modules  # what `compile_repeated_blocks` compiles

    @register_to_config
    def __init__(
        self,
        codebook_size: int,
        num_classes: int,
        token_grid: tuple[int, int],
        hidden_size: int = 768,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        mlp_size: int = 3072,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.mask_token_id = codebook_size
        length = token_grid[0] * token_grid[1]

        self.token_embedding = nn.Embedding(codebook_size + 1, hidden_size)  # the last row is the mask token's
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null class's
        self.position_embedding = nn.Parameter(torch.empty(length + 1, hidden_size))
        self.input_layer = nn.Sequential(
            nn.LayerNorm(hidden_size, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
        )
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                hidden_size,
                num_attention_heads,
                hidden_size // num_attention_heads,
                dropout=dropout,
                attention_bias=True,
                activation_fn="gelu",
                ff_inner_dim=mlp_size,
                final_dropout=True,
            )
            for _ in range(num_layers)
        )
        self.output_layer = nn.Sequential(
            nn.LayerNorm(hidden_size, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size, eps=1e-12),
        )
        self.output_bias = nn.Parameter(torch.zeros(length, codebook_size))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: torch.Tensor,
        condition: Condition,
        perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V), or (M, V) of `positions`, for tokens (B, L) or embeddings (B, L, D); see `Denoiser`."""
        labels = condition.class_labels
        labels = torch.where(labels < 0, self.config.num_classes, labels)

        embeddings = tokens if tokens.is_floating_point() else self.embed(tokens)
        if perturb is not None:
            embeddings = perturb(embeddings)
        hidden = torch.cat([embeddings, self.class_embedding(labels)[:, None]], dim=1) + self.position_embedding

        hidden = self.input_layer(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        hidden, bias = hidden[:, :-1], self.output_bias
        if positions is not None:
            hidden, bias = hidden.flatten(0, 1)[positions], bias[positions % tokens.shape[1]]

        return project_to_codebook(self.output_layer(hidden), self.token_embedding.weight[:-1]) + bias

    @property
    def condition_kind(self) -> ConditionKind:
        return "classes" if self.config.num_classes else "none"

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> their embeddings (B, L, D), which `forward` takes in place of tokens."""
        return self.token_embedding(tokens)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What Di[M]O keeps fixed: the embeddings, and with them the tied output layer and its bias."""
        yield from self.token_embedding.parameters()
        yield from self.class_embedding.parameters()
        yield self.position_embedding
        yield self.output_bias
