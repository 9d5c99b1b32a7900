"""Images of which something is known, and stays. Shapes: B batch, C channels, h x w the token grid, L = h w."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from teachers.corruption import random_mask
from teachers.randomness import Generators
from teachers.sources.pixels import opaque

Images = Any  # what diffusers' image processors take: an image of Pillow, an array, a tensor, or a list of one kind


def read_images(images: Images, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] in the shape (C, H, W) of a model's, resized where they are of another size."""
    num_channels, *image_size = image_shape
    if isinstance(images, PIL.Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and isinstance(images[0], PIL.Image.Image):
        images = [opaque(image, num_channels) for image in images]
    found = VaeImageProcessor(do_normalize=False).preprocess(images, *image_size).float()
    if found.shape[1] != num_channels:
        raise ValueError(f"got images of {found.shape[1]} channels; this model makes images of {num_channels}")
    return found


def read_masks(masks: Images, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Masks (B, 1, H, W) for images (C, H, W), True where they are white: where something new is to come."""
    _, *image_size = image_shape
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    if isinstance(masks, torch.Tensor | np.ndarray):  # the processor takes no True and False
        masks = 1.0 * masks
    return processor.preprocess(masks, *image_size) > 0.5


def hide(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The images (B, C, H, W) with the mean colour of what is known where `mask` (B, 1, H, W) hides them.

    So nothing of what was there is left for a tokenizer whose tokens know of their surroundings.
    """
    known = (~mask).to(images)
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(mask, mean, images)


def tokens_under(mask: torch.Tensor, token_grid: tuple[int, int]) -> torch.Tensor:
    """The tokens (B, L) any pixel of which lies under a mask (B, 1, H, W)."""
    return F.adaptive_max_pool2d(mask.float(), token_grid).flatten(1) > 0


def forget(tokens: torch.Tensor, strength: float, mask_token_id: int, generator: Generators = None) -> torch.Tensor:
    """Tokens (B, L) with a share `strength` in (0, 1] of them, chosen at random, masked: at least one."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be more than 0 and at most 1: the share of tokens that are new")
    share = torch.full((len(tokens),), strength, device=tokens.device)
    return tokens.masked_fill(random_mask(share, tokens.shape[1], generator), mask_token_id)
