"""Masked diffusion models: networks, tokenizers, corruption, samplers, training objectives."""

from teachers.condition import Condition
from teachers.network import MaskGITTransformer
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.sampler import MaskGITSampler
from teachers.tokenizer import PatchTokenizer

__all__ = ["Condition", "MaskGITSampler", "MaskGITTransformer", "MaskedDiffusionPipeline", "PatchTokenizer"]
