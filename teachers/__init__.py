"""Masked diffusion models: networks, tokenizers, corruption, samplers, training objectives."""

from teachers.condition import Condition
from teachers.halton_network import HaltonMaskGITTransformer
from teachers.network import MaskGITTransformer
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.samplers import (
    ConfidenceThresholdSampler,
    EntropyBoundedSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
    SelfCorrectionSampler,
)
from teachers.tokenizer import PatchTokenizer
from teachers.vq import VQTokenizer

__all__ = [
    "Condition",
    "ConfidenceThresholdSampler",
    "EntropyBoundedSampler",
    "FirstHittingSampler",
    "HaltonMaskGITTransformer",
    "HaltonSampler",
    "MaskGITSampler",
    "MaskGITTransformer",
    "MaskedDiffusionPipeline",
    "PUNTSampler",
    "PatchTokenizer",
    "ReMDMSampler",
    "SelfCorrectionSampler",
    "VQTokenizer",
]
