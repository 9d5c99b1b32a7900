"""Masked diffusion models: networks, tokenizers, corruption, samplers, training objectives."""

from teachers.condition import Condition
from teachers.halton_network import HaltonMaskGITTransformer
from teachers.network import MaskGITTransformer
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.sampler import MaskGITSampler
from teachers.tokenizer import PatchTokenizer
from teachers.vq import VQTokenizer

__all__ = [
    "Condition",
    "HaltonMaskGITTransformer",
    "MaskGITSampler",
    "MaskGITTransformer",
    "MaskedDiffusionPipeline",
    "PatchTokenizer",
    "VQTokenizer",
]
