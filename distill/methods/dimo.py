"""Di[M]O: distil a masked diffusion model into a one-step generator (arXiv 2503.15457).

Shapes: B batch, L tokens, M masked tokens of the batch, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.config import setting
from distill.methods.divergence import divergence_gradient, jeffreys_divergence, with_gradient
from distill.methods.method import Alarm, Method
from students.initialisation import TokenInitialiser, mark
from teachers.conditions.condition import Condition
from teachers.corruption import MASK_SCHEDULES, corrupt, random_region, scheduled_mask_ratio
from teachers.denoiser import Denoiser
from teachers.guidance import check_guidance, guide
from teachers.objectives.masked import masked_cross_entropy, sum_and_number
from teachers.randomness import rand, sample_tokens, shape_logits, to_device

AUXILIARY_SAMPLES = ("shared", "fresh")
WEIGHTINGS = ("sum", "paper")
CITATION = r"""@inproceedings{zhu2025dimo,
  title     = {Di[M]O: Distilling Masked Diffusion Models into One-step Generator},
  author    = {Zhu, Yuanzhi and Wang, Xi and Lathuili\`ere, St\'ephane and Kalogeiton, Vicky},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}"""


@dataclass
class DiMOConfig:
    """The settings of Di[M]O."""

    name: str = setting("dimo", "which method")
    auxiliary_learning_rate: float = setting(1e-3, "about five times the student's: the auxiliary has to follow it")
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
    lowest_token_entropy: float = setting(0.01, "alarm: nats per token; below, each start has one outcome")
    lowest_unique_tokens: float = setting(0.01, "alarm: share of the codebook in a batch; below, all images are one")

    def __post_init__(self) -> None:
        for name, known in [
            ("weighting", WEIGHTINGS),
            ("mask_schedule", MASK_SCHEDULES),
            ("auxiliary_samples", AUXILIARY_SAMPLES),
        ]:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose from {', '.join(known)}")
        for name in ("teacher_temperature", "temperature", "auxiliary_learning_rate"):
            if not getattr(self, name) > 0:
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


class DiMO(Method):
    """The student's and the auxiliary's losses, of (student, auxiliary, teacher) and a batch of conditions."""

    config_class = DiMOConfig
    title, reference, url = "Di[M]O", "arXiv 2503.15457", "https://arxiv.org/abs/2503.15457"
    citation = CITATION

    def __init__(
        self,
        config: DiMOConfig,
        teacher: Denoiser,
        initialiser: TokenInitialiser,
        learner: Callable[[], Denoiser],
        compiled: bool = False,
    ):
        self.config, self.compiled = config, compiled
        self.teacher, self.initialiser = teacher, initialiser
        self.networks = {"student": learner(), "auxiliary": learner()}
        self.optimizers = {"auxiliary": {"lr": config.auxiliary_learning_rate}}
        self.shape: dict[str, Any] = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        self.alarms = alarms(config, initialiser.config.codebook_size)
        if config.auxiliary_samples == "shared":
            self.updates = (("student", "auxiliary"),) + (("auxiliary",),) * (config.auxiliary_updates - 1)
        else:
            self.updates = (("student",),) + (("auxiliary",),) * config.auxiliary_updates

    @classmethod
    def check(cls, config: DiMOConfig, teacher: Denoiser) -> None:
        check_guidance(teacher, config.guidance_scale)
        if teacher.token_kind != "categorical":
            raise ValueError(f"Di[M]O matches distributions over tokens, and this teacher's are {teacher.token_kind}")

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        condition: Condition,
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of each network named in `update`, and metrics if this step is to be measured."""
        config, mask_token_id = self.config, self.initialiser.config.mask_token_id
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, torch.Tensor] = {}

        known, stays = self.known_tokens(networks["student"], condition, generators)
        initial = self.initialiser(condition, generators, known)
        with torch.set_grad_enabled("student" in update):
            logits = networks["student"](initial, condition, self.initialiser.perturbation(initial, known, generators))
        tokens = sample_tokens(logits.detach(), generators, **self.shape)  # x_0, on-policy
        tokens = self.initialiser.keep(tokens, known)
        progress = rand(len(tokens), 1, generator=generators).squeeze(1)
        mask_ratio = scheduled_mask_ratio(config.mask_schedule, progress).clamp(*config.mask_ratio_range)
        corrupted, positions = corrupt(tokens, mask_ratio, mask_token_id, generators, stays)  # x_t
        with torch.set_grad_enabled("auxiliary" in update):
            auxiliary_logits = networks["auxiliary"](corrupted, condition, self.told(known), positions)  # (M, V)

        if "student" in update:
            with torch.no_grad():
                teacher_logits = guide(self.teacher, corrupted, condition, config.guidance_scale, positions)
                teacher_logits /= config.teacher_temperature
            weight = sample_weights(config.weighting, logits, teacher_logits, positions)
            if measured:
                metrics |= student_metrics(logits, teacher_logits, auxiliary_logits, tokens, positions, config.beta)
            # The teacher's logits are not needed after this; for their memory the gradient takes their place.
            gradient = divergence_gradient(
                teacher_logits, auxiliary_logits, config.beta, out=teacher_logits, compiled=self.compiled
            )
            gradient *= weight[:, None]
            losses["student"] = with_gradient(logits, positions, gradient)

        if "auxiliary" in update:
            soft_targets = None
            if config.auxiliary_soft_weight > 0:
                soft_targets = shape_logits(logits.detach().flatten(0, 1)[positions], **self.shape).softmax(-1)
            del logits  # for their memory; the gradient is all that goes back through them
            losses["auxiliary"] = masked_cross_entropy(
                auxiliary_logits,
                tokens.flatten()[positions],
                tokens.numel(),
                label_smoothing=config.auxiliary_label_smoothing,
                soft_targets=soft_targets,
                soft_weight=config.auxiliary_soft_weight,
            )
            if measured:
                total = losses["auxiliary"] * tokens.numel()
                metrics["auxiliary_cross_entropy"] = sum_and_number(total, len(positions))

        return losses, metrics

    def told(self, known: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What the auxiliary is told, by marked embeddings: which tokens were known.

        Else it would give the mean of these samples and of those made whole, and the student would make up in the one
        for what it lacks in the other.
        """
        return None if known is None else partial(mark, where=known != self.initialiser.config.mask_token_id)

    @torch.no_grad()
    def known_tokens(
        self, student: nn.Module, condition: Condition, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What of some samples is known, tokens (B, L) with masks elsewhere, and where (B, L), on the CPU; or None.

        They are the student's own, of a whole image: so it learns to complete images without any that are real.
        """
        if self.initialiser.config.known_tokens == 0:
            return None, None
        initial = self.initialiser(condition, generators)
        logits = student(initial, condition, self.initialiser.perturbation(initial, None, generators))
        tokens = sample_tokens(logits, generators, **self.shape)
        stays = random_region(self.initialiser.config.token_grid, generators)
        stays &= rand(len(tokens), 1, generator=generators) < self.initialiser.config.known_tokens
        return tokens.masked_fill(~to_device(stays, tokens.device), self.initialiser.config.mask_token_id), stays


def alarms(config: DiMOConfig, codebook_size: int) -> list[Alarm]:
    """Losses do not tell that a distillation goes wrong; these do."""
    collapsed, alike = (
        "next to nothing: the student has collapsed",
        "next to nothing: the student's images are all alike",
    )
    lost = "more than that of guessing: the auxiliary is lost, and the student with it"
    return [
        Alarm("token_entropy", config.lowest_token_entropy, math.inf, collapsed),
        Alarm("unique_tokens", config.lowest_unique_tokens, math.inf, alike),
        Alarm("auxiliary_cross_entropy", 0.0, math.log(codebook_size), lost),
    ]


@torch.no_grad()
def sample_weights(
    weighting: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The factor (M,) on the gradient at each masked position, the mean over the batch included.

    Of the student's logits (B, L, V) and the teacher's (M, V): "sum" is 1 / B, as in the authors' code. "paper" is
    w(t) / (L_M B): the mean over the L_M masked tokens of a sample with w(t) = 1 / mean |p_student(x_0 | x_init) -
    p_teacher(x_0 | x_t)| over them and the codebook (appendix C).
    """
    batch_size, length, _ = student_logits.shape
    if weighting == "sum":
        return torch.full((len(positions),), 1 / batch_size, device=positions.device)
    sample = positions // length
    student = student_logits.flatten(0, 1)[positions].float().softmax(-1)
    difference = (student - teacher_logits.float().softmax(-1)).abs().mean(-1)
    zeros = torch.zeros(batch_size, device=positions.device)
    num_masked = zeros.index_add(0, sample, torch.ones_like(difference))
    mean = zeros.index_add(0, sample, difference) / num_masked
    return (1 / (mean.clamp(min=1e-5) * num_masked * batch_size))[sample]


@torch.no_grad()
def student_metrics(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    auxiliary_logits: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    beta: float,
) -> dict[str, torch.Tensor]:
    """What tells how distillation goes, since its losses do not.

    `divergence` (nats per masked token) is between teacher and auxiliary; `teacher_agreement` is the teacher's mean
    probability of the student's tokens where they are masked; `token_entropy` (nats per token) is the student's, and
    `unique_tokens` the share of the codebook in these samples: a fall of them to zero is collapse.
    """
    divergence = jeffreys_divergence(teacher_logits, auxiliary_logits, beta)
    agreement = teacher_logits.float().softmax(-1).gather(-1, tokens.flatten()[positions][:, None])
    log_probabilities = logits.float().log_softmax(-1)
    return {
        "divergence": sum_and_number(divergence.sum(), len(positions)),
        "teacher_agreement": sum_and_number(agreement.sum(), len(positions)),
        "token_entropy": -(log_probabilities.exp() * log_probabilities).sum(-1).mean(),
        "unique_tokens": logits.new_zeros(logits.shape[-1]).float().index_fill_(0, tokens.flatten(), 1).mean(),
    }
