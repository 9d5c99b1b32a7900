"""The one-step generator: token initialisation, one-step pipeline, export."""

from diffusers import ModelMixin

from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline

__all__ = ["ModelMixin", "OneStepPipeline", "TokenInitialiser"]

TokenInitialiser.__module__ = __name__  # as in `teachers`: the name it is saved by
