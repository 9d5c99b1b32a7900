"""Image tokenizers: images in [0, 1] <-> token grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from sklearn.cluster import KMeans


class PatchTokenizer(ModelMixin, ConfigMixin):
    """A token per non-overlapping patch: the index of the nearest entry of a k-means codebook.

    With `patch_size=1` the tokens are grey levels (or colours). Nothing but the codebook is learnt, so it suits small
    images. Shapes: B batch, C channels, H x W image, L = (H / patch) (W / patch) tokens.
    """

    @register_to_config
    def __init__(self, image_size: tuple[int, int], num_channels: int, patch_size: int, codebook_size: int):
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}x{patch_size}")
        self.token_grid = (height // patch_size, width // patch_size)
        self.codebook_size = codebook_size
        self.register_buffer("codebook", torch.zeros(codebook_size, num_channels * patch_size**2))

    @classmethod
    def fit(cls, images: torch.Tensor, *, patch_size: int, codebook_size: int, seed: int = 0) -> PatchTokenizer:
        """A tokenizer whose codebook is k-means of the patches of images (B, C, H, W)."""
        _, num_channels, height, width = images.shape
        tokenizer = cls((height, width), num_channels, patch_size, codebook_size)
        patches = tokenizer._patches(images).flatten(0, 1)
        num_distinct = len(patches.unique(dim=0))
        if num_distinct < codebook_size:
            raise ValueError(
                f"codebook_size={codebook_size}, but the images hold only {num_distinct} different "
                f"{patch_size}x{patch_size} patches; ask for at most that many"
            )
        kmeans = KMeans(codebook_size, n_init=1, random_state=seed).fit(patches.numpy())
        tokenizer.codebook.copy_(torch.from_numpy(kmeans.cluster_centers_))
        return tokenizer

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of its images."""
        return (self.config.num_channels, *self.config.image_size)

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, L, C * patch * patch)."""
        return F.pixel_unshuffle(images, self.config.patch_size).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L) int64."""
        return torch.cdist(self._patches(images.float()), self.codebook.float()).argmin(-1)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        patches = self.codebook[tokens].transpose(1, 2).unflatten(2, self.token_grid)
        return F.pixel_shuffle(patches, self.config.patch_size).clamp(0, 1)
