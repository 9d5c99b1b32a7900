"""Images of which something is known, and stays. Shapes: B batch, C channels, h x w the token grid, L = h w."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from teachers.corruption import random_mask
from teachers.randomness import Generators
from teachers.sources.pixels import image_to_tensor

Images = Any  # of Pillow, or arrays (H, W), (H, W, C) or (B, H, W, C), or tensors (C, H, W) or (B, C, H, W), or a list


def read_images(images: Images, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Images as a model makes them, (B, C, H, W) in [0, 1], resized where they are of another size."""
    return torch.stack([_resized(image, image_shape) for image in as_pixels(images, image_shape[0])])


def read_incomplete(
    images: Images, masks: Images, image_shape: tuple[int, int, int], token_grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) as a model makes them, and which of their tokens (B, L) are new: all that a mask touches.

    A mask is white, or transparent, where something new is to come. What lies there is hidden before anything else is
    done. There is one mask for all images or one for each, or many for one image.
    """
    found, hiding = as_pixels(images, image_shape[0]), [mask >= 0.5 for mask in as_pixels(masks, 1)]
    count = max(len(found), len(hiding))
    if {len(found), len(hiding)} - {1, count}:
        raise ValueError(f"got {len(found)} images and {len(hiding)} masks; pass one mask for all, or one for each")
    found, hiding = (part * (count // len(part)) for part in (found, hiding))
    hidden = [hide(image, _cover(mask, image.shape[1:])) for image, mask in zip(found, hiding, strict=True)]
    is_new = torch.stack([_cover(mask, token_grid).flatten() for mask in hiding])
    return torch.stack([_resized(image, image_shape) for image in hidden]), is_new


def as_pixels(images: Images, num_channels: int) -> list[torch.Tensor]:
    """Images of any kind and size, each (C, H, W) in [0, 1]; whole numbers are taken for 0 to 255."""
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError("got no images, an empty list")
        return [pixels for image in images for pixels in as_pixels(image, num_channels)]
    if isinstance(images, PIL.Image.Image):
        return [image_to_tensor(images, num_channels=num_channels)]
    if isinstance(images, np.ndarray):
        grey = images.ndim == 2
        images = torch.from_numpy(np.ascontiguousarray(images))
        images = images[None] if grey else images.movedim(-1, -3)
    if not isinstance(images, torch.Tensor) or images.dim() not in (3, 4):
        raise ValueError(f"got {type(images).__name__} for an image; pass Pillow's, or tensors (C, H, W), or arrays")
    images = images if images.dim() == 4 else images[None]
    whole = not images.is_floating_point() and images.dtype != torch.bool
    images = images.float() / (255 if whole else 1)
    if images.numel() == 0 or not 0 <= images.min() <= images.max() <= 1:
        raise ValueError("images are numbers from 0 to 1, or whole ones from 0 to 255; these are others, or none")
    if images.shape[1] == 1:
        images = images.expand(-1, num_channels, -1, -1)
    elif num_channels == 1:
        images = images.mean(1, keepdim=True)
    if images.shape[1] != num_channels:
        raise ValueError(f"got images of {images.shape[1]} channels; wanted are {num_channels}")
    return list(images)


def hide(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """An image (C, H, W) with the colours of the nearest known pixels where a mask (1, H, W) hides it; else black.

    So nothing of what was there is left for a tokenizer whose tokens know of their surroundings, and it sees no edge.
    """
    if mask.all():
        return torch.zeros_like(image)
    row, column = distance_transform_edt(mask[0].cpu().numpy(), return_distances=False, return_indices=True)
    return image[:, row, column]


def _cover(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A mask (1, H, W) in another size (1, h, w), True wherever any of it is."""
    return F.adaptive_max_pool2d(mask.float(), size) > 0


def _resized(image: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
    if image.shape[1:] == tuple(image_shape[1:]):
        return image
    size = tuple(image_shape[1:])
    return F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def forget(tokens: torch.Tensor, strength: float, mask_token_id: int, generator: Generators = None) -> torch.Tensor:
    """Tokens (B, L) with a share `strength` in (0, 1] of them, chosen at random, masked: at least one."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be more than 0 and at most 1: the share of tokens that are new")
    share = torch.full((len(tokens),), strength, device=tokens.device)
    return tokens.masked_fill(random_mask(share, tokens.shape[1], generator), mask_token_id)
