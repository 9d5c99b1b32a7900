"""What may be asked of any component of a pipeline: the settings it was made with, and whose weights it has."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn


def settings_of(component: ConfigMixin) -> dict[str, Any]:
    """What its constructor takes of its config, without diffusers' own entries and what published files add."""
    taken = inspect.signature(type(component).__init__).parameters
    return {key: value for key, value in component.config.items() if key in taken}


def check_weights(network: nn.Module, name: str) -> None:
    """A ValueError where weights or buffers are missing or not finite numbers, found in one pass where they lie."""
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no weights {key}; is its file whole?")
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # unlike isfinite, without copies
            raise ValueError(f"the weights of {name} are not finite numbers: {key}")


def weights_digest(network: nn.Module) -> str:
    """The SHA-256 of its weights and buffers."""
    found = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
