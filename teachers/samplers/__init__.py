"""How a teacher turns masks into tokens in several steps."""

from diffusers import SchedulerMixin

from teachers.samplers.adaptive import ConfidenceThresholdSampler, EntropyBoundedSampler, FirstHittingSampler
from teachers.samplers.halton import HaltonSampler
from teachers.samplers.maskgit import MaskGITSampler
from teachers.samplers.punt import PUNTSampler
from teachers.samplers.remdm import ReMDMSampler
from teachers.samplers.sampler import Sampler
from teachers.samplers.self_correction import SelfCorrectionSampler

__all__ = [
    "ConfidenceThresholdSampler",
    "EntropyBoundedSampler",
    "FirstHittingSampler",
    "HaltonSampler",
    "MaskGITSampler",
    "PUNTSampler",
    "ReMDMSampler",
    "Sampler",
    "SchedulerMixin",
    "SelfCorrectionSampler",
]
