"""aMUSEd: diffusers' `UVit2DModel` as a denoiser (arXiv 2401.01808). Shapes: B batch, L = h x w tokens, V codebook."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin, UVit2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from teachers.component import settings_of
from teachers.conditions.condition import TextCondition
from teachers.networks.meissonic import as_grid, as_sequence
from teachers.networks.output import with_float32_logits


class AmusedDenoiser(ModelMixin, ConfigMixin):
    """Tokens (B, L), `mask_token_id` where masked, and prompts -> logits (B, L, V) for the clean tokens.

    `settings` are those of the `UVit2DModel`; of its `vocab_size` tokens the last one is the mask.
    """

    condition_kind: ClassVar = "text"
    token_kind: ClassVar = "categorical"

    _no_split_modules: ClassVar = ["BasicTransformerBlock"]  # what FSDP2 shards by itself
    _repeated_blocks: ClassVar = _no_split_modules  # what `compile_repeated_blocks` compiles

    @register_to_config
    def __init__(self, token_grid: tuple[int, int], settings: dict[str, Any]):
        super().__init__()
        self.transformer = with_float32_logits(UVit2DModel(**settings))
        self.mask_token_id = self.transformer.config.vocab_size - 1

    @classmethod
    def wrap(cls, transformer: UVit2DModel, token_grid: tuple[int, int]) -> AmusedDenoiser:
        """The denoiser that a published transformer is."""
        with torch.device("meta"):  # no memory for the weights that the published ones take the place of
            denoiser = cls(token_grid, settings_of(transformer))
        denoiser.transformer = with_float32_logits(transformer)
        return denoiser

    def forward(
        self,
        tokens: torch.Tensor,
        condition: TextCondition,
        perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V), or (M, V) of `positions`, for tokens (B, L) or embeddings (B, L, D); see `Denoiser`."""
        height, width = self.config.token_grid
        embed, head = self.transformer.embed, self.transformer.mlm_layer
        embeddings = None
        if tokens.is_floating_point():
            embeddings, tokens = tokens, torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)

        def enter(module: nn.Module, inputs: Any, grid: torch.Tensor) -> torch.Tensor:
            sequence = as_sequence(grid) if embeddings is None else embeddings
            return as_grid(sequence if perturb is None else perturb(sequence), height)

        with contextlib.ExitStack() as hooks:  # diffusers' forward has no other way in
            if embeddings is not None or perturb is not None:
                hooks.enter_context(embed.register_forward_hook(enter))
            if positions is not None:
                hooks.enter_context(
                    head.register_forward_pre_hook(
                        lambda module, inputs: (as_sequence(inputs[0]).flatten(0, 1)[positions][:, :, None, None],)
                    )
                )
            logits = self.transformer(
                tokens.unflatten(1, (height, width)), condition.states, condition.pooled, condition.micro_conditions
            )
        return as_sequence(logits) if positions is None else logits[:, :, 0, 0]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> their embeddings (B, L, D), which `forward` takes in place of tokens."""
        return as_sequence(self.transformer.embed(tokens.unflatten(1, self.config.token_grid)))

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What Di[M]O keeps fixed: the token embeddings and the output layer."""
        yield from self.transformer.embed.parameters()
        yield from self.transformer.mlm_layer.parameters()

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.transformer.transformer_layers)

    @property
    def text_sizes(self) -> tuple[int, int]:
        """Widths of the text encoder's states and of its pooled embedding."""
        config = self.transformer.config
        return config.encoder_hidden_size, config.cond_embed_dim
