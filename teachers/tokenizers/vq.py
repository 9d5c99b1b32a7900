"""The VQ tokenizer: diffusers' `VQModel` behind the tokenizer's interface."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config

from teachers.component import settings_of

MAX_PIXELS = 2**21  # of images worked on at a time: the network holds some hundreds of numbers for each


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
        """The tokenizer that the `VQModel` of aMUSEd, Meissonic or Monetico is, which becomes its own."""
        factor = 2 ** (len(vq.config.block_out_channels) - 1)
        vq.register_to_config(lookup_from_codebook=False)  # entries are looked up here
        with torch.device("meta"):  # no memory for the weights that the published ones take the place of
            tokenizer = cls((factor * token_grid[0], factor * token_grid[1]), settings_of(vq), unit_range=True)
        tokenizer.vq = vq
        return tokenizer

    @property
    def codebook(self) -> torch.nn.Parameter:
        """(V, E)."""
        return self.vq.quantize.embedding.weight

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of its images."""
        return (self.vq.config.out_channels, *self.config.image_size)

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
        latents, codebook = latents.float(), self.codebook.float()  # entries are closer than bfloat16 can tell
        distance = codebook.square().sum(-1) - 2 * latents @ codebook.T  # less the latents' own square
        return distance.argmin(-1)

    def render(self, quantised: torch.Tensor) -> torch.Tensor:
        """Codebook entries (B, L, E) -> images (B, C, H, W), in [0, 1] but for over- and undershoot."""
        grid = quantised.transpose(1, 2).unflatten(2, self.token_grid)
        images = self.vq.decoder(self.vq.post_quant_conv(grid))  # `vq.decode` has the host wait for a loss of zeros
        return images if self.config.unit_range else (images + 1) / 2

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L) int64."""
        if tuple(images.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"images of {tuple(images.shape[-2:])}, but this tokenizer is for {self.config.image_size}"
            )
        pieces = images.to(self._ready().dtype).split(self._num_at_once)
        return torch.cat([self.nearest(self.latents(piece)) for piece in pieces])

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        pieces = tokens.split(self._ready()._num_at_once)
        return torch.cat([self.render(self.codebook[piece]).clamp(0, 1) for piece in pieces])

    def _ready(self) -> Self:
        """Itself, in single precision where it was in float16, in which it overflows."""
        return self.float() if self.dtype == torch.float16 else self

    @property
    def _num_at_once(self) -> int:
        height, width = self.config.image_size
        return max(1, MAX_PIXELS // (height * width))

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
    return use_of_counts(tokens.flatten().bincount(minlength=codebook_size))


def use_of_counts(counts: torch.Tensor) -> tuple[float, float]:
    """The same, of how often each entry (V,) occurs."""
    probability = counts.double() / counts.sum()
    perplexity = torch.special.entr(probability).sum().exp()
    return (probability > 0).double().mean().item(), perplexity.item()
