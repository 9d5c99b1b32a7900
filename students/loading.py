"""Open a pipeline folder of either kind."""

import json
from pathlib import Path

from students.pipeline import OneStepPipeline
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.published import is_published

PIPELINES = {"MaskedDiffusionPipeline": MaskedDiffusionPipeline, "OneStepPipeline": OneStepPipeline}


def load_pipeline(directory: Path | str) -> MaskedDiffusionPipeline | OneStepPipeline:
    """The teacher or student saved in a folder, or a published teacher.

    A folder that holds none is a FileNotFoundError or ValueError.
    """
    index = Path(directory) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"there is no pipeline in {directory}: it has no model_index.json")
    if is_published(directory):
        return MaskedDiffusionPipeline.from_pretrained(directory)
    name = json.loads(index.read_text()).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{directory} holds a {name}; expected {' or '.join(PIPELINES)}")
    return PIPELINES[name].from_pretrained(directory)
