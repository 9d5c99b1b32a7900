"""The one-step generator: token initialisation, one-step pipeline, export."""

from diffusers import ModelMixin

from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline

__all__ = ["ModelMixin", "OneStepPipeline", "TokenInitialiser"]

TokenInitialiser.__module__ = "one_step_mdm.students"  # as in `teachers`: the name it is saved by
