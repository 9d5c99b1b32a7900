"""The optimizer of a network and its learning rate, as the settings have them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from distill.loop.config import TrainingConfig
from distill.loop.state import trained_parameters


def make_optimizer(config: TrainingConfig, network: nn.Module, **others: Any) -> torch.optim.Optimizer:
    """AdamW for what learns; `others` go before the settings."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    # Fused is one call; and it can leave a step out without the host's knowing.
    return torch.optim.AdamW(trained_parameters(network).values(), fused=True, **settings | others)


def make_schedule(config: TrainingConfig, optimizer: torch.optim.Optimizer, step: int) -> LRScheduler:
    """The learning rate from a step on, a function of step and settings: a run may go on with other ones."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(
        config.learning_rate_schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.num_steps,
        last_epoch=step - 1,
    )
