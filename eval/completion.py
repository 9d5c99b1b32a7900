"""How well a pipeline completes real images of which it is shown a part.

Shapes: N images, C channels, H x W pixels; a mask is True where they are hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image

from eval.evaluate import Reference, batch_size_for, spread
from eval.tuning import REPORT_SEED, TUNING_SEED
from students.export import image_grid
from teachers.inpainting import hide
from teachers.pipeline import TokenPipeline
from teachers.progress import progress_bar
from teachers.randomness import sample_generators

HIDDEN = ("right half", "centre")
NUM_SHOWN = 12  # images in a picture


def hidden(what: str, height: int, width: int) -> torch.Tensor:
    """The mask (1, 1, H, W) of the right half, or of the centre, half as high and wide as the image."""
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    if what == "right half":
        mask[..., width // 2 :] = True
    else:
        mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return mask


@torch.no_grad()
def complete(
    pipeline: TokenPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    seed: int = 0,
    description: str | None = None,
    **settings,
) -> tuple[torch.Tensor, float]:
    """Images (N, C, H, W) whose hidden part is the pipeline's, and the evaluations that each took.

    Each has a generator of its own, a function of the seed and its number.
    """
    pipeline.set_progress_bar_config(disable=True)  # the batches have one
    made, evaluations = [], 0.0
    numbers = torch.arange(len(images)).split(batch_size_for(pipeline))
    for part in progress_bar(numbers, desc=description, disable=description is None, unit="batch", leave=False):
        output = pipeline.inpaint(
            images[part],
            mask,
            class_labels=labels[part],
            generator=sample_generators("complete", seed, places=part.tolist()),
            output_type="pt",
            **settings,
        )
        made.append(output.images.float().cpu())
        evaluations += output.nfe * len(part)
    return torch.cat(made), evaluations / len(images)


def seam(images: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean difference of neighbouring pixels of images (N, C, H, W) of which one is under the mask and one not."""
    steps = []
    for axis in (-1, -2):
        crosses = mask.int().diff(dim=axis) != 0
        steps.append(images.diff(dim=axis).abs()[crosses.expand(len(images), images.shape[1], -1, -1)])
    return torch.cat(steps).mean().item()


def measure_completion(
    pipeline: TokenPipeline,
    candidates: list[dict[str, Any]],
    images: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    reference: Reference,
    num_tuning_images: int,
    name: str,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The settings with the lowest Fréchet distance on some of the images, measured on all of them on another draw.

    Returns {"settings", "nfe", the reference's measures ..., "seam"} and the images (N, C, H, W).
    """
    distance, _ = reference.features.distance_names
    tried = []
    for number, settings in enumerate(candidates if len(candidates) > 1 else ()):
        description = f"{name}: tuning {number + 1}/{len(candidates)}"
        some = spread(len(images), num_tuning_images)  # of classes that may lie one after another
        made, _ = complete(pipeline, images[some], labels[some], mask, TUNING_SEED, description, **settings)
        tried.append(reference.judge(reference.features(made), labels[some])[distance])
    best = candidates[tried.index(min(tried))] if tried else candidates[0]
    made, nfe = complete(pipeline, images, labels, mask, REPORT_SEED, f"{name}: measuring", **best)
    measures = reference.measure(reference.features(made), labels)
    return {"settings": best, "nfe": nfe, **measures, "seam": seam(made, mask)}, made


@torch.no_grad()
def untouched(
    pipeline: TokenPipeline, images: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, reference: Reference
) -> dict[str, Any]:
    """The same of the images themselves, encoded and decoded: what the tokenizer alone costs, and the seam of none."""
    made = torch.cat([pipeline.decode(pipeline.encode(part)).float().cpu() for part in images.split(256)])
    measures = reference.measure(reference.features(made), labels)
    return {"settings": {}, "nfe": 0.0, **measures, "seam": seam(made, mask)}


def completion_table(rows: list[dict[str, Any]]) -> str:
    """A line of Markdown for each row."""
    lines = ["| hidden | | settings | NFE | FD | class cons. | precision | recall | seam |", "|" + "---|" * 9]
    for row in rows:
        settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
        fd, *others = (row[key] for key in ("fd", "class_consistency", "precision", "recall", "seam"))
        figures = " | ".join([f"{row['nfe']:g}", f"{fd:.2f}", *(f"{value:.3f}" for value in others)])
        lines.append(f"| {row['hidden']} | {row['name']} | {settings} | {figures} |")
    return "\n".join(lines)


def completion_picture(images: torch.Tensor, mask: torch.Tensor, completions: list[torch.Tensor]) -> Image:
    """A column for each image: as it is, what is shown of it, and what each of the pipelines made of that."""
    shown = [images, torch.stack([hide(image, mask[0]) for image in images[:NUM_SHOWN]]), *completions]
    return image_grid(torch.cat([part[:NUM_SHOWN] for part in shown]), min(NUM_SHOWN, len(images)))
