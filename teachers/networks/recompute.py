"""Gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Keep the inputs of these layers alone; what is inside them is computed again in the backward pass.

    For every network here, diffusers' own among them: that of its `UVit2DModel` passes keyword arguments where none are
    taken.
    """
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
