"""Export of a one-step student: safetensors with their origin in the metadata, configs, a model card.

What makes the folder open in diffusers itself is written by `save_pretrained`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from students.pipeline import OneStepPipeline
from teachers.component import weights_digest
from teachers.conditions.condition import Condition
from teachers.conditions.prompts import clean_prompts
from teachers.folder import new_folder, stamp
from teachers.pipeline import TokenPipeline
from teachers.randomness import sample_generators

GRID_HEIGHT, GRID_WIDTH = 2048, 5120  # of a picture of samples, in pixels
MARKUP = re.compile(r"[&<>`*_~|$!#\[\]\\]")  # what Markdown and HTML read as more than text


class Credits(Protocol):
    """What a model card says of a method; `citation` is BibTeX."""

    title: str
    reference: str
    url: str
    citation: str


def export_student(
    pipeline: OneStepPipeline,
    output: Path,
    *,
    method: Credits,
    metadata: dict[str, str],
    measurements: list[dict[str, Any]],
    protocol: str,
    prompts: list[str] | None = None,
) -> None:
    """Write a `OneStepPipeline` folder, read it back and compare before it gets its name.

    Args:
        method: how it was distilled.
        metadata: settings and source; goes, with the method, into the safetensors files and the model card.
        measurements: rows of the model card's table; all with the same keys.
        protocol: what the measurements are.
        prompts: for the samples of a student of text; the first ten.

    Raises ValueError if the output folder is not empty, RuntimeError if what was read back differs.
    """
    environment = Environment(loader=PackageLoader(__package__, "."), undefined=StrictUndefined)
    template = environment.get_template("model_card.md.jinja")
    metadata = {"method": f"{method.title} ({method.reference})", **metadata}
    columns = example_conditions(pipeline, prompts)
    names = pipeline.config.get("class_names")
    shown = [names[str(label)] for label in columns] if names else columns
    named = isinstance(shown[0], str)
    card = template.render(
        name=output.name,
        method=method,
        metadata=metadata,
        measurements=measurements,
        protocol=protocol,
        kind=pipeline.condition_kind,
        columns=[as_text(column) for column in shown] if named else shown,
        named=named,
        example=_example(pipeline, shown),
    )
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
        for component in ("denoiser", "initialiser"):
            stamp(folder / component, metadata)
        sample_grid(pipeline, pipeline.encode_condition(columns)).save(folder / "samples.png")
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "measurements.json").write_text(json.dumps(measurements, indent=2), encoding="utf-8")
        _compare(pipeline, OneStepPipeline.from_pretrained(folder), columns)


def as_text(name: str) -> str:
    """A class's name or a prompt, which others wrote, as Markdown that shows it and nothing else."""
    (line,) = clean_prompts([name])
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def _example(pipeline: TokenPipeline, columns: list[Any]) -> str:
    """What to call the pipeline with, as Python writes it."""
    if pipeline.condition_kind == "none":
        return "batch_size=4"
    return repr(columns[0]) if pipeline.condition_kind == "text" else f"class_labels={columns[:2]!r}"


def grid_shape(pipeline: TokenPipeline) -> tuple[int, int]:
    """Rows and columns of a picture of samples: 8 and 10, fewer of large images."""
    height, width = pipeline.tokenizer.config.image_size
    return max(1, min(8, GRID_HEIGHT // height)), max(1, min(10, GRID_WIDTH // width))


def example_conditions(pipeline: TokenPipeline, prompts: list[str] | None = None) -> list[Any]:
    """Conditions to show samples of, a column each: the first classes, the first of the prompts, or none."""
    _, num_columns = grid_shape(pipeline)
    if pipeline.condition_kind == "text":
        if not prompts:
            raise ValueError("this model is conditioned on text: say what to draw (--prompt)")
        return prompts[:num_columns]
    if pipeline.condition_kind == "classes":
        return list(range(min(pipeline.num_classes, num_columns)))
    return [None] * num_columns


@torch.no_grad()
def _compare(pipeline: OneStepPipeline, reloaded: OneStepPipeline, conditions: list[Any]) -> None:
    """Raise RuntimeError unless both have the same weights, and initial tokens and logits for these conditions.

    Logits may differ by rounding: the product of a single row depends on where in memory the weights lie.
    """
    results = []
    for candidate in (pipeline, reloaded):
        condition = candidate.encode_condition(conditions)
        generator = sample_generators("compare", places=range(len(condition)))
        initial = candidate.initialiser(condition, generator)
        logits = candidate.denoiser(initial, condition, candidate.initialiser.perturbation(initial, None, generator))
        results.append((weights_digest(candidate.denoiser), initial.cpu(), logits.cpu()))
    (weights, initial, logits), (weights_reloaded, initial_reloaded, logits_reloaded) = results
    same = weights == weights_reloaded and torch.equal(initial, initial_reloaded)
    if not same or not torch.allclose(logits, logits_reloaded, rtol=1e-3, atol=1e-3):
        raise RuntimeError("the exported student, read back, does not give the same logits; nothing was exported")


def sample_grid(pipeline: TokenPipeline, columns: Condition, min_size: int = 32) -> Image.Image:
    """Samples with a fixed seed: a column for each of the conditions, or of as many as there is room for."""
    num_rows, num_columns = grid_shape(pipeline)
    columns = columns.select(slice(num_columns))
    condition = columns.select(torch.arange(len(columns)).repeat(num_rows))
    generator = sample_generators("samples", places=range(len(condition)))
    images = pipeline(condition=condition, generator=generator, output_type="pt").images
    return image_grid(images, len(columns), min_size)


def image_grid(images: torch.Tensor, num_columns: int, min_size: int = 32) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] side by side, small ones enlarged to at least `min_size` pixels."""
    factor = max(1, -(-min_size // images.shape[-1]))
    images = images.cpu().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5).expand(-1, 3, -1, -1)
    rows = [torch.cat(list(row), -1) for row in images.split(num_columns)]
    pixels = (torch.cat(rows, -2).permute(1, 2, 0) * 255).round().byte().numpy()
    return Image.fromarray(pixels)
