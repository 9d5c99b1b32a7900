"""Masked diffusion models: networks, tokenizers, corruption, samplers, training objectives."""

from teachers.conditions.condition import Condition
from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.maskgit import MaskGITTransformer
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
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.vq import VQTokenizer

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
