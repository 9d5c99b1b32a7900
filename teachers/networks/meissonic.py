"""The transformer of Meissonic and Monetico: a bidirectional, text-conditional denoiser (arXiv 2410.08261).

Its parameters have the names of the released safetensors, so that a published folder loads as it is. Shapes: B batch,
L = h x w tokens, D hidden size, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding, get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import Downsample2D, Upsample2D
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.uvit_2d import UVit2DConvEmbed
from torch import nn

from teachers.conditions.condition import TextCondition
from teachers.networks.output import OutputLayer

EPS = 1e-6
NUM_MICRO_CONDITIONS, MICRO_CONDITION_SIZE = 5, 256


class MeissonicTransformer(ModelMixin, ConfigMixin):
    """Tokens (B, L), `mask_token_id` where masked, and prompts -> logits (B, L, V) for the clean tokens.

    With down- and upsampling (Meissonic) the transformer sees a grid of half the height and width; without
    (Monetico), that of the tokens.

    `timestep` is what the network is told of time, in every call. It learnt with the share of masks times 1000, was
    released with a sampler that passes the number of steps left, and was distilled by the authors of Di[M]O with 0:
    it hardly listens, and 0 is what is kept here.
    """

    condition_kind: ClassVar = "text"
    token_kind: ClassVar = "categorical"

    _no_split_modules: ClassVar = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]  # what FSDP2 shards by itself
    _repeated_blocks: ClassVar = _no_split_modules  # what `compile_repeated_blocks` compiles

    @register_to_config
    def __init__(
        self,
        token_grid: tuple[int, int] = (64, 64),
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        num_layers: int = 14,
        num_single_layers: int = 28,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        codebook_size: int = 8192,
        vocab_size: int = 8256,
        downsample: bool = True,
        upsample: bool = True,
        timestep: float = 0.0,
    ):
        super().__init__()
        self.mask_token_id = vocab_size - 1
        size = attention_head_dim * num_attention_heads

        self.embed = TokenEmbedding(size, size, vocab_size, elementwise_affine=True, eps=EPS, bias=False)
        self.down_block = nn.ModuleDict(
            {
                "downsample": Downsample2D(
                    size, use_conv=True, padding=0, name="Conv2d_0", kernel_size=2, norm_type="rms_norm", eps=EPS,
                    elementwise_affine=True, bias=False,
                )
            }
            if downsample
            else {}
        )  # fmt: skip
        self.project_to_hidden_norm = RMSNorm(size, EPS)
        self.project_to_hidden = nn.Linear(size, size, bias=False)

        self.context_embedder = nn.Linear(joint_attention_dim, size)
        self.encoder_proj_layer_norm = RMSNorm(size, EPS)
        micro_size = NUM_MICRO_CONDITIONS * MICRO_CONDITION_SIZE
        self.cond_embed = TimestepEmbedding(pooled_projection_dim + micro_size, size, sample_proj_bias=False)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(size, pooled_projection_dim=size)
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        self._rotary_tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(size, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(size, num_attention_heads, attention_head_dim) for _ in range(num_single_layers)
        )

        self.project_from_hidden_norm = RMSNorm(size, EPS)
        self.project_from_hidden = nn.Linear(size, size, bias=False)
        self.up_block = nn.ModuleDict(
            {
                "upsample": Upsample2D(
                    size, use_conv_transpose=True, kernel_size=2, padding=0, name="conv", norm_type="rms_norm", eps=EPS,
                    elementwise_affine=True, bias=False, interpolate=False,
                )
            }
            if upsample
            else {}
        )  # fmt: skip
        self.mlm_layer = OutputLayer(size, size, False, True, EPS, codebook_size)

    def forward(
        self,
        tokens: torch.Tensor,
        condition: TextCondition,
        perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V), or (M, V) of `positions`, for tokens (B, L) or embeddings (B, L, D); see `Denoiser`."""
        height, _ = self.config.token_grid
        embeddings = tokens if tokens.is_floating_point() else self.embed(tokens)
        if perturb is not None:
            embeddings = perturb(embeddings)
        hidden = as_grid(embeddings, height)
        for block in self.down_block.values():
            hidden = block(hidden)
        inner_height = hidden.shape[2]
        hidden = self.project_to_hidden(self.project_to_hidden_norm(as_sequence(hidden)))

        text = self.encoder_proj_layer_norm(self.context_embedder(condition.states))
        embedding = self._condition_embedding(condition)
        rotary = self._rotary(text.shape[1], inner_height, tokens.device)
        for block in self.transformer_blocks:
            text, hidden = block(hidden, text, embedding, rotary)
        for block in self.single_transformer_blocks:
            text, hidden = block(hidden, text, embedding, rotary)

        hidden = self.project_from_hidden(self.project_from_hidden_norm(hidden))
        hidden = as_grid(hidden, inner_height)
        for block in self.up_block.values():
            hidden = block(hidden)
        if positions is not None:
            return self.mlm_layer(as_sequence(hidden).flatten(0, 1)[positions][:, :, None, None])[:, :, 0, 0]
        return as_sequence(self.mlm_layer(hidden))

    def _condition_embedding(self, condition: TextCondition) -> torch.Tensor:
        """Of time, the pooled prompt and the micro-conditions, (B, D)."""
        micro = get_timestep_embedding(
            condition.micro_conditions.flatten(), MICRO_CONDITION_SIZE, flip_sin_to_cos=True, downscale_freq_shift=0
        ).view(len(condition), -1)
        pooled = self.cond_embed(torch.cat([condition.pooled, micro.to(condition.pooled)], dim=1))
        timestep = torch.full((len(condition),), 1000 * self.config.timestep, device=pooled.device, dtype=pooled.dtype)
        return self.time_text_embed(timestep, pooled)

    def _rotary(self, num_text_tokens: int, height: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables of the positions (0, row, column) that the transformer sees, after those of the text, all 0."""
        key = num_text_tokens, height, device
        if key not in self._rotary_tables:  # they are made on the CPU, and a GPU would be waited for in every forward
            width = height * self.config.token_grid[1] // self.config.token_grid[0]
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
            tables = self.pos_embed(torch.cat([image.new_zeros(num_text_tokens, 3), image]))
            self._rotary_tables[key] = tuple(table.to(device) for table in tables)
        return self._rotary_tables[key]

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What Di[M]O keeps fixed: the token embeddings and the output layer."""
        yield from self.embed.parameters()
        yield from self.mlm_layer.parameters()

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def text_sizes(self) -> tuple[int, int]:
        """Widths of the text encoder's states and of its pooled embedding."""
        return self.config.joint_attention_dim, self.config.pooled_projection_dim


class TokenEmbedding(UVit2DConvEmbed):
    """Tokens (B, L) -> embeddings (B, L, D); diffusers' own is of grids."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return as_sequence(super().forward(tokens[:, :, None]))  # a convolution of single positions, whatever the grid


def as_sequence(grid: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B, h w, D)."""
    return grid.flatten(2).transpose(1, 2)


def as_grid(sequence: torch.Tensor, height: int) -> torch.Tensor:
    """(B, h w, D) -> (B, D, h, w)."""
    return sequence.transpose(1, 2).unflatten(2, (height, -1))
