"""Measure a pipeline: generate, take features, compare with real images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval.distances import Gaussian, frechet_distance, kernel_distance, precision_recall
from teachers.conditions.condition import Conditions
from teachers.data import NO_CLASS
from teachers.pipeline import TokenPipeline, all_classes
from teachers.progress import progress_bar
from teachers.randomness import sample_generators

MAX_NEIGHBOURS = 10_000


class Features(Protocol):
    """A feature network: images (N, C, H, W) in [0, 1] -> features (N, D).

    It also judges how true features are to the conditions of the images, given their rows (N,), if it knows those.
    """

    name: str
    distance_names: tuple[str, str]

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]: ...


def generate(
    pipeline: TokenPipeline,
    num_images: int,
    *,
    conditions: Conditions | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    description: str | None = None,
    process: int = 0,
    num_processes: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
    **settings,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Images (N, C, H, W), the rows (N,) of the conditions they are of, and the NFE per image.

    Of several processes each gets every `num_processes`-th image, from its own number on.

    They go round the conditions: of a class-conditional pipeline by default all classes, whose rows are the labels; of
    an unconditional one they are `NO_CLASS`.

    Every image has a generator of its own, a function of the seed and its number: the batch size changes nothing but
    the time. `heartbeat` is called before each batch, equally often on every process.
    """
    if batch_size is None:  # of more tokens the activations leave the caches of a CPU
        batch_size = max(1, 2048 // pipeline.sequence_length) if pipeline.device.type == "cpu" else 500
    conditions = all_classes(pipeline) if conditions is None else conditions
    numbers = torch.arange(num_images)[process::num_processes]
    images, evaluations = [], 0.0
    starts = range(0, -(-num_images // num_processes), batch_size)
    for start in progress_bar(starts, desc=description, disable=description is None, unit="batch", leave=False):
        heartbeat()
        chosen = numbers[start : start + batch_size]
        if len(chosen) == 0:
            continue
        generators = sample_generators("generate", seed, places=chosen.tolist())
        condition = conditions.condition(chosen % len(conditions), pipeline.device)
        output = pipeline(condition=condition, generator=generators, output_type="pt", **settings)
        images.append(output.images.cpu())
        evaluations += output.nfe * len(chosen)
    rows = numbers % len(conditions) if pipeline.condition_kind != "none" else torch.full_like(numbers, NO_CLASS)
    return torch.cat(images), rows, evaluations / len(numbers)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """What was computed of the images of each process (N_p, ...), of all of them (N, ...) and in their order."""
    num_processes = PartialState().num_processes
    if num_processes == 1:
        return rows
    parts = gather_object([rows])
    whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
    for process, part in enumerate(parts):
        whole[process::num_processes] = part
    return whole


class Reference:
    """The real images that generated ones are compared with."""

    def __init__(self, features: Features, images: torch.Tensor):
        self.features = features
        self.real_features = features(images)
        self.gaussian = Gaussian.fit(self.real_features)
        # Kernel distance and neighbours are over all pairs: of many real images, a part that is spread over them.
        self.neighbours = self.real_features[:: -(-len(images) // MAX_NEIGHBOURS)]

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Fréchet and kernel distance, precision, recall, density, coverage, and how true the images are to their
        conditions: class consistency, or CLIP score and retrieval accuracy."""
        generated = self.features(images)
        _, kernel_name = self.features.distance_names
        return {
            **self.judge(generated, labels),
            kernel_name: kernel_distance(self.neighbours, generated),
            **precision_recall(self.neighbours, generated),
        }

    def distance(self, images: torch.Tensor) -> float:
        """The Fréchet distance alone."""
        return frechet_distance(self.gaussian, Gaussian.fit(self.features(images)))

    def quick(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The Fréchet distance, and how true the images are to their conditions, alone."""
        return self.judge(self.features(images), labels)

    def judge(self, generated: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """What `quick` measures, of features."""
        frechet_name, _ = self.features.distance_names
        distance = frechet_distance(self.gaussian, Gaussian.fit(generated))
        return {frechet_name: distance, **self.features.judge(generated, labels)}

    def split_half_distance(self, seed: int = 0) -> float:
        """Fréchet distance between two random halves of the real images: what so few samples show of no difference."""
        order = torch.randperm(len(self.real_features), generator=torch.Generator().manual_seed(seed))
        first, second = self.real_features[order].chunk(2)
        return frechet_distance(Gaussian.fit(first), Gaussian.fit(second))
