"""Di[M]O: distil a masked diffusion model into a one-step generator (arXiv 2503.15457).

Shapes: B batch, L tokens, M masked tokens of the batch, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distill.config import setting
from distill.methods.divergence import divergence_gradient, jeffreys_divergence, with_gradient
from students.initialisation import TokenInitialiser
from teachers.conditions.condition import Condition
from teachers.corruption import MASK_SCHEDULES, corrupt, scheduled_mask_ratio
from teachers.guidance import guide
from teachers.objectives.masked import masked_cross_entropy, sum_and_number
from teachers.randomness import rand, sample_tokens

AUXILIARY_SAMPLES = ("shared", "fresh")
WEIGHTINGS = ("sum", "paper")


@dataclass
class DiMOConfig:
    """The settings of Di[M]O."""

    guidance_scale: float = setting(1.0, "of the teacher: u + s (c - u); 1 is none")
    teacher_temperature: float = setting(1.0, "the teacher's logits are divided by it")
    beta: float = setting(0.0, "the divergence: 0 forward KL, 1 reverse KL, any real number")
    weighting: str = setting("sum", "of the gradient: sum (the authors' code), or paper (w(t) / L_M)")
    mask_schedule: str = setting("arccos", "how x_t is masked: arccos, cosine, linear, square")
    mask_ratio_range: tuple[float, float] = setting((0.0, 1.0), "lowest and highest mask ratio of x_t")
    temperature: float = setting(1.0, "of the student's samples in training")
    top_k: int = setting(0, "of the student's samples in training; 0 keeps all")
    top_p: float = setting(1.0, "of the student's samples in training; 1 keeps all")
    auxiliary_samples: str = setting("shared", "the auxiliary learns from the student's own x_t, or from fresh ones")
    auxiliary_updates: int = setting(1, "auxiliary updates per student update")
    auxiliary_label_smoothing: float = setting(0.0, "of the auxiliary's cross-entropy")
    auxiliary_soft_weight: float = setting(0.0, "share of the student's probabilities in the auxiliary's targets")

    def __post_init__(self) -> None:
        for name, known in [
            ("weighting", WEIGHTINGS),
            ("mask_schedule", MASK_SCHEDULES),
            ("auxiliary_samples", AUXILIARY_SAMPLES),
        ]:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose from {', '.join(known)}")
        for name in ("teacher_temperature", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        lowest, highest = self.mask_ratio_range
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"mask_ratio_range={[lowest, highest]} must be ordered and within [0, 1]")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        for name in ("auxiliary_label_smoothing", "auxiliary_soft_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.auxiliary_updates < 1:
            raise ValueError(f"auxiliary_updates={self.auxiliary_updates} must be at least 1")


class DiMO:
    """How the student's and the auxiliary's losses come from (student, auxiliary, teacher) and a batch of conditions.

    A training step is the sequence of `updates`, each naming the networks that learn from one draw of samples.
    """

    def __init__(self, config: DiMOConfig, teacher: nn.Module, initialiser: TokenInitialiser, compiled: bool = False):
        self.config = config
        self.compiled = compiled  # what is done with the logits; the networks are the caller's
        self.teacher = teacher
        self.initialiser = initialiser
        if config.auxiliary_samples == "shared":
            self.updates = (("student", "auxiliary"),) + (("auxiliary",),) * (config.auxiliary_updates - 1)
        else:
            self.updates = (("student",),) + (("auxiliary",),) * config.auxiliary_updates

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        condition: Condition,
        generator: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of each network named in `update`, and metrics if this step is to be measured."""
        config, mask_token_id = self.config, self.initialiser.config.mask_token_id
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, torch.Tensor] = {}

        initial = self.initialiser(condition, generator)
        with torch.set_grad_enabled("student" in update):
            logits = networks["student"](initial, condition, self.initialiser.perturbation(generator))
        tokens = sample_tokens(  # x_0, on-policy
            logits.detach(), generator, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        progress = rand(len(tokens), 1, generator=generator).squeeze(1)
        mask_ratio = scheduled_mask_ratio(config.mask_schedule, progress).clamp(*config.mask_ratio_range)
        corrupted, places = corrupt(tokens, mask_ratio, mask_token_id, generator)  # x_t
        with torch.set_grad_enabled("auxiliary" in update):
            auxiliary_logits = networks["auxiliary"](corrupted, condition, where=places)  # (M, V)

        if "student" in update:
            with torch.no_grad():
                teacher_logits = guide(self.teacher, corrupted, condition, config.guidance_scale, where=places).float()
                teacher_logits /= config.teacher_temperature
            weight = sample_weights(config.weighting, logits, teacher_logits, places)
            if measured:
                metrics |= student_metrics(logits, teacher_logits, auxiliary_logits, tokens, places, config.beta)
            # The teacher's logits are not needed after this; for their memory the gradient takes their place.
            gradient = divergence_gradient(
                teacher_logits, auxiliary_logits, config.beta, out=teacher_logits, compiled=self.compiled
            )
            gradient *= weight[:, None]
            losses["student"] = with_gradient(logits, places, gradient)

        if "auxiliary" in update:
            soft_targets = None
            if config.auxiliary_soft_weight > 0:
                soft_targets = logits.detach().flatten(0, 1)[places].float().softmax(-1)
            del logits  # for their memory; the gradient is all that goes back through them
            losses["auxiliary"] = masked_cross_entropy(
                auxiliary_logits,
                tokens.flatten()[places],
                tokens.numel(),
                label_smoothing=config.auxiliary_label_smoothing,
                soft_targets=soft_targets,
                soft_weight=config.auxiliary_soft_weight,
            )
            if measured:
                total = losses["auxiliary"] * tokens.numel()
                metrics["auxiliary_cross_entropy"] = sum_and_number(total, len(places))

        return losses, metrics


@torch.no_grad()
def sample_weights(
    weighting: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """The factor (M,) on the gradient at each masked place, the mean over the batch included.

    Of the student's logits (B, L, V) and the teacher's (M, V): "sum" is 1 / B, as in the authors' code. "paper" is
    w(t) / (L_M B): the mean over the L_M masked tokens of a sample with w(t) = 1 / mean |p_student(x_0 | x_init) -
    p_teacher(x_0 | x_t)| over them and the codebook (appendix C).
    """
    batch_size, length, _ = student_logits.shape
    if weighting == "sum":
        return torch.full((len(places),), 1 / batch_size, device=places.device)
    sample = places // length
    student = student_logits.flatten(0, 1)[places].float().softmax(-1)
    difference = (student - teacher_logits.float().softmax(-1)).abs().mean(-1)
    zeros = torch.zeros(batch_size, device=places.device)
    num_masked = zeros.index_add(0, sample, torch.ones_like(difference))
    mean = zeros.index_add(0, sample, difference) / num_masked
    return (1 / (mean.clamp(min=1e-5) * num_masked * batch_size))[sample]


@torch.no_grad()
def student_metrics(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    auxiliary_logits: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    beta: float,
) -> dict[str, torch.Tensor]:
    """What tells how distillation goes, since its losses do not.

    `divergence` (nats per masked token) is between teacher and auxiliary; `teacher_agreement` is the teacher's mean
    probability of the student's tokens where they are masked; `token_entropy` (nats per token) is the student's, and
    `unique_tokens` the share of the codebook in these samples: a fall of them to zero is collapse.
    """
    divergence = jeffreys_divergence(teacher_logits, auxiliary_logits, beta)
    agreement = teacher_logits.float().softmax(-1).gather(-1, tokens.flatten()[places][:, None])
    log_probabilities = logits.float().log_softmax(-1)
    return {
        "divergence": sum_and_number(divergence.sum(), len(places)),
        "teacher_agreement": sum_and_number(agreement.sum(), len(places)),
        "token_entropy": -(log_probabilities.exp() * log_probabilities).sum(-1).mean(),
        "unique_tokens": logits.new_zeros(logits.shape[-1]).float().index_fill_(0, tokens.flatten(), 1).mean(),
    }
