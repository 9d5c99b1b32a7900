"""Classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from teachers.conditions.condition import Condition
from teachers.denoiser import Denoiser
from teachers.randomness import check_shape, shape_logits


def check_guidance(denoiser: Denoiser, guidance_scale: float) -> None:
    """A ValueError for guidance where there is no condition, and for what is no number."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number; 1 is no guidance")
    if denoiser.condition_kind == "none" and guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={guidance_scale} leads towards a condition, and this model has none; leave it at 1"
        )


def guide(
    denoiser: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    condition: Condition,
    guidance_scale: float | torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Guided logits u + s (c - u) (B, L, V), float32, from one concatenated forward; s = 1 is the conditional alone.

    The scale is one number, or, without `positions`, a tensor (B,) with one for each sample. With `positions` (M,),
    counted through the batch as b L + l, the logits are theirs (M, V).
    """
    if not isinstance(guidance_scale, torch.Tensor) and guidance_scale == 1:
        return denoiser(tokens, condition, **_positions(positions)).float()
    both = Condition.concatenate([condition, condition.null()])
    if positions is not None:
        positions = torch.cat([positions, positions + tokens.numel()])
    logits = denoiser(torch.cat([tokens, tokens]), both, **_positions(positions)).float()
    conditional, unconditional = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    if isinstance(guidance_scale, torch.Tensor):
        guidance_scale = guidance_scale.to(conditional)[:, None, None]
    return unconditional.lerp_(conditional, guidance_scale)  # in place, for memory


def _positions(positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Samplers ask of a denoiser no more than (tokens, condition): any masked model is one to them."""
    return {} if positions is None else {"positions": positions}


RAMPS = ("constant", "linear")


class GuidedDenoiser:
    """What a sampler calls: the logits that tokens are drawn from, and the count of evaluations spent on each sample.

    Args:
        guidance_scale, ramp: "constant" guidance, or "linear", from none at progress 0 to `guidance_scale` at 1.
        on_step: what `end_step` asks.
        shape: temperature, top_k and top_p, as in `shape_logits`.
    """

    def __init__(
        self,
        denoiser: Any,
        condition: Condition,
        guidance_scale: float = 1.0,
        ramp: str = "constant",
        on_step: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        **shape,
    ):
        if ramp not in RAMPS:
            raise ValueError(f"guidance_ramp={ramp!r} is not known; choose from {', '.join(RAMPS)}")
        check_shape(**shape)
        self.denoiser = denoiser
        self.condition = condition
        self.guidance_scale = guidance_scale
        self.ramp = ramp
        self.on_step = on_step
        self.shape = shape
        self.nfe = torch.zeros(len(condition), dtype=torch.long)

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    def __call__(
        self, tokens: torch.Tensor, progress: float | torch.Tensor = 0.0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Shaped logits (R, L, V) for tokens (R, L) of the samples in `rows` (R,), or of the whole batch.

        Progress is 0 at the first step and 1 at the last, one number or a tensor (R,). A guided evaluation counts as
        two, and each sample's are counted in `nfe` (B,).
        """
        scale: float | torch.Tensor = self.guidance_scale
        if self.ramp == "linear" and scale != 1:
            scale = 1 + (scale - 1) * progress
        cost = 1 if isinstance(scale, float | int) and scale == 1 else 2
        if rows is None:
            condition = self.condition
            self.nfe += cost
        else:
            condition = self.condition.select(rows)
            self.nfe[rows.cpu()] += cost
        return shape_logits(guide(self.denoiser, tokens, condition, scale), **self.shape)

    def end_step(self, tokens: torch.Tensor, left: int) -> torch.Tensor:
        """The tokens (B, L) to go on with after a step of a sampler that led to these; `left` steps come at most."""
        return tokens if self.on_step is None else self.on_step(tokens, left)
