"""Open a pipeline of either kind."""

from pathlib import Path
from typing import Any

import torch

from students.pipeline import OneStepPipeline
from teachers.hub import HUB_SETTINGS, find_index
from teachers.opening import read_index
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.published import is_published

PIPELINES = {"MaskedDiffusionPipeline": MaskedDiffusionPipeline, "OneStepPipeline": OneStepPipeline}


def load_pipeline(
    name: Path | str, torch_dtype: torch.dtype = torch.float32, subfolder: str | None = None, **settings: Any
) -> MaskedDiffusionPipeline | OneStepPipeline:
    """The teacher or student of a folder or hub id, or a published teacher, with weights of this type.

    It takes the settings of `from_pretrained`. A place that holds none is a FileNotFoundError or ValueError.
    """
    hub = {key: value for key, value in settings.items() if key in HUB_SETTINGS}
    index = read_index(find_index(name, subfolder, **hub))
    kind = "MaskedDiffusionPipeline" if is_published(index) else index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{name} holds a {kind}; expected {' or '.join(PIPELINES)}")
    return PIPELINES[kind].from_pretrained(name, subfolder, torch_dtype=torch_dtype, **settings)
