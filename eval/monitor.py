"""What a training run looks at now and then: a fixed-seed grid of samples and a quick FD."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from eval.classifier import ClassifierFeatures
from eval.evaluate import Reference, generate
from students.export import image_grid
from teachers.data import DataConfig, load_data
from teachers.pipeline import TokenPipeline

NUM_IMAGES = 1000


class SampleMonitor:
    """Called with (pipeline, step): writes `samples/step-000100.png`, returns FD and class consistency.

    Without data (`data.name` empty) it only writes the samples.
    """

    def __init__(self, output: Path, data: DataConfig):
        self.folder = output / "samples"
        self.data = data
        self._reference: Reference | None = None

    def __call__(self, pipeline: TokenPipeline, step: int) -> dict[str, float]:
        images, labels, _ = generate(pipeline, NUM_IMAGES)
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = min(pipeline.num_classes, 10)
        grid = image_grid(images[labels < columns][: 8 * columns], columns)
        grid.save(self.folder / f"step-{step:06d}.png")
        if not self.data.name:
            return {}
        if self._reference is None:
            self._reference = reference_for(self.data, self.folder.parent.parent / "classifier")
        return self._reference.quick(images, labels)


def real_images(data: DataConfig) -> torch.Tensor:
    """The real images to compare with: the configured split; of the embedded digits, all."""
    return load_data(replace(data, split="all") if data.name == "digits" else data).images()


def reference_for(data: DataConfig, classifier_folder: Path) -> Reference:
    """The real images, seen through a classifier that is trained on the data and kept in the folder.

    Its accuracy is that on a held-out tenth of the split; of the digits, on their test split.
    """
    if data.name == "digits":
        train, test = load_data(replace(data, split="train")), load_data(replace(data, split="test"))
    else:
        train, test = load_data(data).hold_out(0.1)
    return Reference(ClassifierFeatures.cached(classifier_folder, data, train, test), real_images(data))
