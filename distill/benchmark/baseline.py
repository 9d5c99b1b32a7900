"""The training step of Di[M]O in the order of the authors' loop, to measure ours against.

Shapes: B batch, L tokens, V codebook size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import nn

from distill.loop.state import trained_parameters
from students.initialisation import TokenInitialiser
from teachers.conditions.condition import Condition
from teachers.corruption import corrupt, scheduled_mask_ratio
from teachers.guidance import guide


class BaselineStep:
    """A step in the order of the authors' loop: fresh samples for the auxiliary, logits of all positions, the gradient
    by way of a squared error, and norms and metrics read on the host."""

    def __init__(
        self,
        teacher: nn.Module,
        initialiser: TokenInitialiser,
        guidance_scale: float,
        networks: dict[str, nn.Module],
        learning_rate: float = 1e-5,
    ):
        self.teacher, self.initialiser, self.networks = teacher, initialiser, networks
        self.guidance_scale = guidance_scale
        self.optimizers = {
            name: torch.optim.AdamW(trained_parameters(network).values(), lr=learning_rate)
            for name, network in networks.items()
        }
        self.ema = EMAModel(trained_parameters(networks["student"]).values(), foreach=True)

    def __call__(self, condition: Condition) -> None:
        loss, divergence = self.student_loss(condition)
        self._update("student", loss)
        _ = loss.item(), divergence.item()
        loss = self.auxiliary_loss(condition)
        self._update("auxiliary", loss)
        _ = loss.item()
        self.ema.step(trained_parameters(self.networks["student"]).values())

    def student_loss(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """Half the squared error to the logits less the gradient, and the divergence."""
        logits = self.networks["student"](self.initialiser(condition), condition)
        corrupted, _ = self._corrupt(logits)
        mask = corrupted == self.initialiser.config.mask_token_id
        with torch.no_grad():
            teacher_logits = guide(self.teacher, corrupted, condition, self.guidance_scale).clone()  # lets the rest go
            auxiliary_logits = self.networks["auxiliary"](corrupted, condition)
            p_t, p_a = teacher_logits.float().softmax(-1), auxiliary_logits.float().softmax(-1)
            log_t, log_a = teacher_logits.float().log_softmax(-1), auxiliary_logits.float().log_softmax(-1)
            divergence = F.kl_div(log_a, log_t, reduction="none", log_target=True).sum(-1)
            gradient = torch.nan_to_num(torch.where(mask[..., None], p_a - p_t, 0.0))
            target = logits.float() - gradient
        return 0.5 * F.mse_loss(logits.float(), target, reduction="sum") / len(logits), (divergence * mask).sum()

    def auxiliary_loss(self, condition: Condition) -> torch.Tensor:
        with torch.no_grad():
            logits = self.networks["student"](self.initialiser(condition), condition)
        corrupted, tokens = self._corrupt(logits)
        mask = corrupted == self.initialiser.config.mask_token_id
        del logits
        targets = torch.where(mask, tokens, -100)
        logits = self.networks["auxiliary"](corrupted, condition)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / mask.numel()

    def _corrupt(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.distributions.Categorical(logits=logits.detach().float()).sample()
        mask_ratio = scheduled_mask_ratio("arccos", torch.rand(len(tokens)))
        corrupted, _ = corrupt(tokens, mask_ratio, self.initialiser.config.mask_token_id, None)
        return corrupted, tokens

    def _update(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()
        parameters = [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]
        _ = sum(parameter.grad.norm().item() ** 2 for parameter in parameters)  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
