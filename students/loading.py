"""Open a pipeline folder of either kind."""

import json
import warnings
from pathlib import Path

import torch

from students.pipeline import OneStepPipeline
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.published import is_published

PIPELINES = {"MaskedDiffusionPipeline": MaskedDiffusionPipeline, "OneStepPipeline": OneStepPipeline}


def load_pipeline(
    directory: Path | str, torch_dtype: torch.dtype = torch.float32
) -> MaskedDiffusionPipeline | OneStepPipeline:
    """The teacher or student saved in a folder, or a published teacher, with weights of this type.

    A folder that holds none is a FileNotFoundError or ValueError.
    """
    index = Path(directory) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"there is no pipeline in {directory}: it has no model_index.json")
    published = is_published(directory)
    name = "MaskedDiffusionPipeline" if published else json.loads(index.read_text()).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{directory} holds a {name}; expected {' or '.join(PIPELINES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases of diffusers have another name for it
        return PIPELINES[name].from_pretrained(directory, torch_dtype=torch_dtype)
