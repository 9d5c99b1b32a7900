"""The last product of a network, in float32 whatever else is computed in. Shapes: D hidden size, V codebook size."""

from __future__ import annotations

import contextlib

import torch
from diffusers import UVit2DModel
from diffusers.models.unets.uvit_2d import ConvMlmLayer


def project_to_codebook(hidden: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of hidden states (..., D) and the codebook's embeddings (V, D), in float32.

    In bfloat16, logits of 16 and more are 0.125 apart. It is a hundredth of a network's operations.
    """
    device = hidden.device.type
    autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else None
    with autocast or contextlib.nullcontext():
        return hidden.float() @ codebook.float().T


class OutputLayer(ConvMlmLayer):
    """The output layer of aMUSEd and Meissonic: grids (B, D, h, w) -> logits (B, V, h, w)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.layer_norm(self.conv1(hidden).permute(0, 2, 3, 1))
        logits = project_to_codebook(hidden, self.conv2.weight[:, :, 0, 0])
        if self.conv2.bias is not None:
            logits = logits + self.conv2.bias
        return logits.permute(0, 3, 1, 2)


def with_float32_logits(transformer: UVit2DModel) -> UVit2DModel:
    """diffusers' transformer, its output layer ours: the same weights under the same names."""
    transformer.mlm_layer.__class__ = OutputLayer
    return transformer
