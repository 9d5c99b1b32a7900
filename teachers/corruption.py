"""The forward process: how tokens are masked.

Shapes: B batch, L tokens, M masked ones.
"""

import math

import torch

from teachers.randomness import Generators, rand, to_device

MASK_SCHEDULES = {
    "linear": lambda progress: 1 - progress,
    "square": lambda progress: (1 - progress) ** 2,
    "cosine": lambda progress: torch.cos(progress * math.pi / 2),
    "arccos": lambda progress: torch.acos(progress) / (math.pi / 2),
}


def scheduled_mask_ratio(schedule: str, progress: torch.Tensor | float) -> torch.Tensor:
    """The share of tokens that is masked when a share `progress` of the time has passed: 1 at 0, 0 at 1 (MaskGIT).

    Samplers walk along it; training draws progress ~ U(0, 1).
    """
    return MASK_SCHEDULES[schedule](torch.as_tensor(progress, dtype=torch.float32))


def random_mask(mask_ratio: torch.Tensor, length: int, generator: Generators = None) -> torch.Tensor:
    """Masks (B, L) of ratios in [0, 1]: (B,) of samples, or (B, L) of positions.

    Of a sample exactly round(L * ratio) positions are masked, and at least one. With a ratio for each position each is
    masked by itself with that probability, and perhaps none is.
    """
    if mask_ratio.dim() == 2:
        return rand(*mask_ratio.shape, generator=generator, device=mask_ratio.device) < mask_ratio
    num_masked = (mask_ratio * length).round().clamp(1, length)
    order = rand(len(mask_ratio), length, generator=generator, device=mask_ratio.device).argsort(-1)
    return order < num_masked[:, None]


def random_region(token_grid: tuple[int, int], generator: list[torch.Generator]) -> torch.Tensor:
    """Positions (B, L) of a grid for each generator, a part of any size: scattered, a rectangle, or all around one."""
    height, width = token_grid
    uniform = rand(len(generator), 6, generator=generator)
    scattered = random_mask(uniform[:, 0], height * width, generator)
    rows, columns = ((1 + uniform[:, n] * size).floor() for n, size in ((1, height), (2, width)))
    top, left = (uniform[:, 3] * (height - rows + 1)).floor(), (uniform[:, 4] * (width - columns + 1)).floor()
    row, column = torch.arange(height)[:, None], torch.arange(width)
    top, left, rows, columns = (number[:, None, None] for number in (top, left, rows, columns))
    inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
    rectangle = inside.flatten(1) ^ (uniform[:, 5:] < 0.25)
    return torch.where(uniform[:, 5:] < 0.5, rectangle, scattered)


def corrupt(
    tokens: torch.Tensor,
    mask_ratio: torch.Tensor,
    mask_token_id: int,
    generator: Generators = None,
    stays: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask tokens (B, L) at ratios (B,) or (B, L): the corrupted tokens x_t ~ q(. | x_0) and the M masked positions.

    What `stays` (B, L) is not masked. Positions (M,) are counted through the batch, b L + l. With ratios, and what
    stays, on the CPU nothing waits for a GPU to count them.
    """
    mask = random_mask(mask_ratio, tokens.shape[1], generator)
    if stays is not None:
        mask &= ~stays
    positions = mask.flatten().nonzero()[:, 0]
    return tokens.masked_fill(to_device(mask, tokens.device), mask_token_id), to_device(positions, tokens.device)
