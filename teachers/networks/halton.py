"""The transformer of Halton-MaskGIT: a bidirectional, class-conditional denoiser (arXiv 2503.17076).

The class acts through adaptive normalisation, a register token takes part in attention, queries and keys are
normalised over all heads together. Shapes: B batch, L tokens, D hidden size, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from torch import nn

from teachers.conditions.condition import Condition
from teachers.denoiser import ConditionKind
from teachers.networks.output import project_to_codebook


class HaltonMaskGITTransformer(ModelMixin, ConfigMixin):
    """Tokens (B, L), `mask_token_id` where masked, and class labels -> logits (B, L, V) for the clean tokens.

    With `num_classes=0` it is unconditional.
    """

    token_kind: ClassVar = "categorical"

    _no_split_modules: ClassVar = ["AdaptiveBlock"]  # what FSDP2 shards by itself
    _repeated_blocks: ClassVar = _no_split_modules  # what `compile_repeated_blocks` compiles

    @register_to_config
    def __init__(
        self,
        codebook_size: int,
        num_classes: int,
        token_grid: tuple[int, int],
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_size: int = 2048,
        num_registers: int = 1,
    ):
        super().__init__()
        self.mask_token_id = codebook_size
        self.token_embedding = nn.Embedding(codebook_size + 1, hidden_size)  # the last row is the mask token's
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null class's
        self.position_embedding = nn.Parameter(torch.empty(token_grid[0] * token_grid[1], hidden_size))
        self.registers = nn.Parameter(torch.empty(num_registers, hidden_size))
        self.blocks = nn.ModuleList(
            AdaptiveBlock(hidden_size, num_attention_heads, mlp_size) for _ in range(num_layers)
        )
        self.output_norm = RMSNorm(hidden_size, eps=1e-5, bias=True)
        self.output_modulation = Modulation(hidden_size, 2)
        self.output_bias = nn.Parameter(torch.zeros(codebook_size))
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.position_embedding, self.registers):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for block in self.blocks:  # each starts as the identity
            nn.init.zeros_(block.modulation.linear.weight)
            nn.init.zeros_(block.modulation.linear.bias)
        nn.init.zeros_(self.output_modulation.linear.bias)

    def forward(
        self,
        tokens: torch.Tensor,
        condition: Condition,
        perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V), or (M, V) of `positions`, for tokens (B, L) or embeddings (B, L, D); see `Denoiser`."""
        labels = condition.class_labels
        classes = self.class_embedding(torch.where(labels < 0, self.config.num_classes, labels))

        embeddings = tokens if tokens.is_floating_point() else self.embed(tokens)
        if perturb is not None:
            embeddings = perturb(embeddings)
        registers = self.registers.expand(len(tokens), -1, -1)
        hidden = torch.cat([embeddings + self.position_embedding, registers], dim=1)
        for block in self.blocks:
            hidden = block(hidden, classes)

        shift, scale = self.output_modulation(classes)
        hidden = self.output_norm(hidden[:, : tokens.shape[1]]) * (1 + scale) + shift
        if positions is not None:
            hidden = hidden.flatten(0, 1)[positions]
        return project_to_codebook(hidden, self.token_embedding.weight[:-1]) + self.output_bias

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
        yield self.registers
        yield self.output_bias


class Modulation(nn.Module):
    """Class embeddings (B, D) -> the shifts, scales and gates (B, 1, D) of adaptive normalisation."""

    def __init__(self, hidden_size: int, num_outputs: int):
        super().__init__()
        self.num_outputs = num_outputs
        self.linear = nn.Linear(hidden_size, num_outputs * hidden_size)

    def forward(self, classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(classes))[:, None].chunk(self.num_outputs, dim=-1)


class AdaptiveBlock(nn.Module):
    """Attention and a gated feed-forward layer, each behind a modulated RMS norm and a gate."""

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_size: int):
        super().__init__()
        self.modulation = Modulation(hidden_size, 6)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.attention = NormalisedAttention(hidden_size, num_attention_heads)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.mlp = FeedForward(hidden_size, inner_dim=mlp_size, activation_fn="swiglu", bias=False)

    def forward(self, hidden: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(classes)
        hidden = hidden + gate_1 * self.attention(self.attention_norm(hidden) * (1 + scale_1) + shift_1)
        return hidden + gate_2 * self.mlp(self.mlp_norm(hidden) * (1 + scale_2) + shift_2)


class NormalisedAttention(nn.Module):
    """Self-attention whose queries and keys are RMS-normalised over all heads together, without parameters.

    diffusers' attention normalises each head alone. Heads are D // num_heads wide; where that leaves a remainder the
    inner width is less than D.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        inner_size = hidden_size // num_heads * num_heads
        self.to_q = nn.Linear(hidden_size, inner_size, bias=False)
        self.to_k = nn.Linear(hidden_size, inner_size, bias=False)
        self.to_v = nn.Linear(hidden_size, inner_size, bias=False)
        self.to_out = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_q(hidden), self.to_k(hidden), self.to_v(hidden)
        query, key = (F.rms_norm(tensor, tensor.shape[-1:], eps=1e-5) for tensor in (query, key))
        heads = [tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads)
        return self.to_out(attended.transpose(1, 2).flatten(2))
