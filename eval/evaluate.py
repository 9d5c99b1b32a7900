"""Measure a pipeline: generate, take features, compare with those of real images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distill.loop.host import gather_on_host
from eval.distances import Gaussian, frechet_distance, kernel_distance, precision_recall
from teachers.conditions.condition import Conditions
from teachers.data import NO_CLASS, ImageData
from teachers.pipeline import TokenPipeline, all_classes
from teachers.progress import progress_bar
from teachers.randomness import sample_generators

MAX_NEIGHBOURS = 10_000
MAX_TOKENS, MAX_PIXELS = 2**16, 2**26  # of a batch on a GPU; the pixels, of all channels, are 256 MiB


class Features(Protocol):
    """A feature network: images (N, C, H, W) in [0, 1], on any device -> features (N, D) on the CPU.

    It also judges how true features are to the conditions of the images, given their rows (N,), if it knows those.
    """

    name: str
    distance_names: tuple[str, str]

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]: ...


@dataclass(frozen=True)
class Batch:
    """Generated images (B, C, H, W), float32 in [0, 1], the rows (B,) of their conditions, and the NFE per image."""

    images: torch.Tensor
    rows: torch.Tensor
    nfe: float


def batch_size_for(pipeline: TokenPipeline) -> int:
    """How many images to generate at a time."""
    if pipeline.device.type == "cpu":  # of more tokens the activations leave the caches
        return max(1, 2048 // pipeline.sequence_length)
    height, width = pipeline.tokenizer.config.image_size
    return max(1, min(MAX_TOKENS // pipeline.sequence_length, MAX_PIXELS // (3 * height * width)))


def generate(
    pipeline: TokenPipeline,
    numbers: torch.Tensor,
    *,
    conditions: Conditions | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    description: str | None = None,
    **settings,
) -> Iterator[Batch]:
    """The images of these numbers (N,), a batch at a time.

    They go round the conditions: of a class-conditional pipeline by default all classes, whose rows are the labels; of
    an unconditional one they are `NO_CLASS`.

    Every image has a generator of its own, a function of the seed and its number: the batch size changes nothing but
    the time.
    """
    pipeline.set_progress_bar_config(disable=True)  # the batches have one
    conditions = all_classes(pipeline) if conditions is None else conditions
    parts = numbers.split(batch_size or batch_size_for(pipeline)) if len(numbers) else ()
    for part in progress_bar(parts, desc=description, disable=description is None, unit="batch", leave=False):
        rows = part % len(conditions)
        output = pipeline(
            condition=conditions.condition(rows, pipeline.device),
            generator=sample_generators("generate", seed, places=part.tolist()),
            output_type="pt",
            **settings,
        )
        rows = rows if pipeline.condition_kind != "none" else torch.full_like(rows, NO_CLASS)
        yield Batch(output.images.float(), rows, output.nfe)


def generate_features(
    pipeline: TokenPipeline, features: Features, num_images: int, **settings
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Features (N, D) of images that `generate` makes, the rows (N,) of their conditions, and the NFE per image."""
    found, rows, evaluations = [], [], 0.0
    for batch in generate(pipeline, torch.arange(num_images), **settings):
        found.append(features(batch.images))
        rows.append(batch.rows)
        evaluations += batch.nfe * len(batch.rows)
    return torch.cat(found), torch.cat(rows), evaluations / num_images


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, each of which has every `num_processes`-th of them, in order."""
    parts = gather_on_host(rows)
    whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
    for process, part in enumerate(parts):
        whole[process :: len(parts)] = part
    return whole


def spread(num_rows: int, num_chosen: int) -> torch.Tensor:
    """So many rows, evenly spread over all; all, where there are no more."""
    num_chosen = min(num_chosen, num_rows)
    return torch.arange(num_chosen) * num_rows // num_chosen


def identify(data: ImageData) -> dict[str, Any]:
    """What tells real images from others before one is read."""
    return {"num_images": len(data), "fingerprint": data.fingerprint}


class Reference:
    """What generated images are compared with: the features (N, D) of real ones; `source` says which these are."""

    def __init__(self, features: Features, real_features: torch.Tensor, source: str):
        self.features, self.real_features, self.source = features, real_features, source
        self.gaussian = Gaussian.fit(real_features)
        # Kernel distance and neighbours are over all pairs: of many real images, a part that is spread over them; of
        # generated ones, which go round the conditions, the first.
        self.neighbours = real_features[spread(len(real_features), MAX_NEIGHBOURS)]

    def measure(self, generated: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        """Of features (N, D) and the rows (N,) of their conditions: what `judge` measures, kernel distance, precision,
        recall, density, coverage."""
        _, kernel_name = self.features.distance_names
        first = generated[:MAX_NEIGHBOURS]
        return {
            **self.judge(generated, rows),
            kernel_name: kernel_distance(self.neighbours, first),
            **precision_recall(self.neighbours, first),
        }

    def judge(self, generated: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        """Fréchet distance, and how true the images are to their conditions: class consistency, or CLIP score and
        retrieval accuracy."""
        frechet_name, _ = self.features.distance_names
        return {frechet_name: self.distance(generated), **self.features.judge(generated, rows)}

    def distance(self, generated: torch.Tensor) -> float:
        """The Fréchet distance alone."""
        return frechet_distance(self.gaussian, Gaussian.fit(generated))

    def split_half_distance(self, seed: int = 0) -> float:
        """Fréchet distance between two random halves of the real images: what so few samples show of no difference."""
        order = torch.randperm(len(self.real_features), generator=torch.Generator().manual_seed(seed))
        first, second = self.real_features[order].chunk(2)
        return frechet_distance(Gaussian.fit(first), Gaussian.fit(second))
