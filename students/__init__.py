"""The one-step generator: token initialisation, one-step pipeline, export."""

from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline

__all__ = ["OneStepPipeline", "TokenInitialiser"]
