"""What a network costs: parameters and floating-point operations."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from teachers.condition import ClassCondition, Condition, TextCondition

NUM_TEXT_TOKENS = 77  # CLIP's


def num_parameters(network: ModelMixin) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def forward_flops(denoiser: ModelMixin) -> int:
    """Operations (2 for a multiplication and addition) of a denoiser's forward on one image, without computing it."""
    height, width = denoiser.config.token_grid
    skeleton = _without_weights(denoiser)
    tokens = torch.zeros(1, height * width, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        skeleton(tokens, _some_condition(denoiser))
    return counter.get_total_flops()


def _some_condition(denoiser: ModelMixin) -> Condition:
    if not hasattr(denoiser, "text_sizes"):
        return ClassCondition(torch.zeros(1, dtype=torch.long, device="meta"))
    width, pooled_width = denoiser.text_sizes
    shapes = (1, NUM_TEXT_TOKENS, width), (1, pooled_width), (1, 5)
    return TextCondition(*(torch.zeros(shape, device="meta") for shape in shapes))


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
