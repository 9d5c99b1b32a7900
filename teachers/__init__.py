"""Masked diffusion models: networks, tokenizers, corruption, samplers, training objectives."""

from diffusers import ModelMixin

from teachers.conditions.condition import Condition
from teachers.denoiser import Denoiser
from teachers.networks.amused import AmusedDenoiser
from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.maskgit import MaskGITTransformer
from teachers.networks.meissonic import MeissonicTransformer
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
    "AmusedDenoiser",
    "Condition",
    "ConfidenceThresholdSampler",
    "Denoiser",
    "EntropyBoundedSampler",
    "FirstHittingSampler",
    "HaltonMaskGITTransformer",
    "HaltonSampler",
    "MaskGITSampler",
    "MaskGITTransformer",
    "MaskedDiffusionPipeline",
    "MeissonicTransformer",
    "ModelMixin",
    "PUNTSampler",
    "PatchTokenizer",
    "ReMDMSampler",
    "SelfCorrectionSampler",
    "VQTokenizer",
]

# A saved pipeline names its components by module and class: by this package as it is called where it is installed,
# whatever files they lie in. diffusers loads them by what it finds here, `ModelMixin` among it.
for _name in __all__:
    _part = globals()[_name]
    if isinstance(_part, type) and issubclass(_part, ModelMixin) and _part is not ModelMixin:
        _part.__module__ = "one_step_mdm.teachers"
