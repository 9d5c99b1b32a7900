"""What a network costs: parameters and floating-point operations."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from teachers.condition import Condition


def num_parameters(network: ModelMixin) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def forward_flops(denoiser: ModelMixin) -> int:
    """Operations (2 for a multiplication and addition) of a denoiser's forward on one image, without computing it."""
    height, width = denoiser.config.token_grid
    skeleton = _without_weights(denoiser)
    tokens = torch.zeros(1, height * width, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        skeleton(tokens, Condition(torch.zeros(1, dtype=torch.long, device="meta")))
    return counter.get_total_flops()


def decoder_flops(tokenizer: ModelMixin) -> int:
    """Operations of a tokenizer's decoder on one image, without computing it."""
    height, width = tokenizer.token_grid
    skeleton = _without_weights(tokenizer)
    with FlopCounterMode(display=False) as counter:
        skeleton.decode(torch.zeros(1, height * width, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def _without_weights(network: ModelMixin) -> ModelMixin:
    settings = {key: value for key, value in network.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return type(network)(**settings)


def cost_summary(pipeline: DiffusionPipeline) -> str:
    """One line: parameters, and operations per image, of a pipeline's denoiser and decoder."""
    denoiser, tokenizer = pipeline.denoiser, pipeline.tokenizer
    return (
        f"denoiser: {num_parameters(denoiser) / 1e6:.1f} M parameters, {forward_flops(denoiser) / 1e9:.1f} GFLOP per "
        f"image and evaluation; decoding: {decoder_flops(tokenizer) / 1e9:.1f} GFLOP per image"
    )
