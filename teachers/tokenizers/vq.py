"""The VQ tokenizer: diffusers' `VQModel` behind the tokenizer's interface."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config

from teachers.component import settings_of


class VQTokenizer(ModelMixin, ConfigMixin):
    """Images in [0, 1] <-> tokens through a `VQModel` that sees them in [-1, 1], or as they are if `unit_range`.

    `settings` are those of the `VQModel`. Each of its levels but the first halves the image, so that the grid is
    the image's size over 2^(levels - 1). With `local` the encoder sees the patch of each token alone, so that equal
    patches have equal tokens; without, a token also says something of what is around it.

    Shapes: B batch, C channels, H x W image, h x w grid, L = h w tokens, E size of a codebook entry.
    """

    @register_to_config
    def __init__(
        self, image_size: tuple[int, int], settings: dict[str, Any], unit_range: bool = False, local: bool = False
    ):
        super().__init__()
        self.vq = VQModel(**settings)
        factor = 2 ** (len(self.vq.config.block_out_channels) - 1)
        height, width = image_size
        if height % factor or width % factor:
            raise ValueError(f"images of {height}x{width} cannot be halved {factor.bit_length() - 1} times")
        self.token_grid = (height // factor, width // factor)
        self.codebook_size = self.vq.config.num_vq_embeddings

    @classmethod
    def wrap(cls, vq: VQModel, token_grid: tuple[int, int]) -> VQTokenizer:
        """The tokenizer that the `VQModel` of aMUSEd, Meissonic or Monetico is."""
        factor = 2 ** (len(vq.config.block_out_channels) - 1)
        settings = settings_of(vq) | {"lookup_from_codebook": False}  # entries are looked up here
        tokenizer = cls((factor * token_grid[0], factor * token_grid[1]), settings, unit_range=True)
        tokenizer.vq.load_state_dict(vq.state_dict())
        return tokenizer

    @property
    def codebook(self) -> torch.nn.Parameter:
        """(V, E)."""
        return self.vq.quantize.embedding.weight

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> latents (B, L, E)."""
        images = images if self.config.unit_range else 2 * images - 1
        if not self.config.local:
            return self.vq.encode(images).latents.flatten(2).transpose(1, 2)
        height, width = self.token_grid
        patches = images.unflatten(3, (width, -1)).unflatten(2, (height, -1)).permute(0, 2, 4, 1, 3, 5)
        return self.vq.encode(patches.flatten(0, 2)).latents.unflatten(0, (-1, height * width)).flatten(2)

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, L, E) -> the tokens (B, L) of the nearest codebook entries."""
        codebook = self.codebook
        distance = codebook.square().sum(-1) - 2 * latents @ codebook.T  # less the latents' own square
        return distance.argmin(-1)

    def render(self, quantised: torch.Tensor) -> torch.Tensor:
        """Codebook entries (B, L, E) -> images (B, C, H, W), in [0, 1] but for over- and undershoot."""
        grid = quantised.transpose(1, 2).unflatten(2, self.token_grid)
        images = self.vq.decode(grid, force_not_quantize=True).sample
        return images if self.config.unit_range else (images + 1) / 2

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L) int64."""
        if tuple(images.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"images of {tuple(images.shape[-2:])}, but this tokenizer is for {self.config.image_size}"
            )
        return self.nearest(self.latents(images))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        return self.render(self.codebook[tokens]).clamp(0, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What training needs: reconstructions (B, C, H, W), latents and their entries (B, L, E), tokens (B, L).

        The reconstruction's gradient passes the quantisation as if it were the identity (arXiv 1711.00937).
        """
        latents = self.latents(images)
        tokens = self.nearest(latents)
        entries = self.codebook[tokens]
        return self.render(latents + (entries - latents).detach()), latents, entries, tokens


@torch.no_grad()
def codebook_use(tokens: torch.Tensor, codebook_size: int) -> tuple[float, float]:
    """The share of the codebook that occurs among the tokens, and the perplexity exp(entropy) of their distribution."""
    probability = tokens.flatten().bincount(minlength=codebook_size).double() / tokens.numel()
    perplexity = torch.special.entr(probability).sum().exp()
    return (probability > 0).double().mean().item(), perplexity.item()
