"""What a training run looks at now and then: a picture of what it makes, and a quick FD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import CLIPModel, CLIPProcessor

from eval.classifier import ClassifierFeatures
from eval.clip_score import ClipFeatures
from eval.evaluate import Reference, gather_rows, generate
from eval.inception import InceptionFeatures
from students.export import image_grid, sample_grid
from teachers.conditions.condition import Conditions
from teachers.conditions.prompt_cache import PromptCache
from teachers.data import DataConfig, load_data
from teachers.pipeline import TokenPipeline
from teachers.tokenizers.vq import VQTokenizer, codebook_use

NUM_IMAGES = 1000


class SampleMonitor:
    """Called with (pipeline, conditions, step, heartbeat) on every process: writes `samples/step-000100.png`, returns
    FD and class consistency, or CLIP score. The processes share the images.

    Without data (`data.name` empty) and without what measures them (labels to train a classifier on; for prompts a CLIP
    that scores) it only writes the samples.
    """

    def __init__(self, output: Path, data: DataConfig, scoring_clip: str = ""):
        self.folder = output / "samples"
        self.data, self.scoring_clip = data, scoring_clip
        self._reference: Reference | None = None

    def __call__(
        self, pipeline: TokenPipeline, conditions: Conditions, step: int, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        state = PartialState()
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            num_columns = 10 if pipeline.condition_kind == "none" else min(len(conditions), 10)
            columns = conditions.condition(torch.arange(num_columns) % len(conditions), pipeline.device)
            sample_grid(pipeline, columns).save(self.folder / f"step-{step:06d}.png")
        judge = self.scoring_clip if pipeline.condition_kind == "text" else self.data.label_column
        if not self.data.name or not judge:
            return {}
        if self._reference is None:
            with state.main_process_first():
                self._reference = self._make_reference(conditions)
        images, rows, _ = generate(
            pipeline,
            NUM_IMAGES,
            conditions=conditions,
            process=state.process_index,
            num_processes=state.num_processes,
            heartbeat=heartbeat,
        )
        features = self._reference.features(images)
        return self._reference.judge(gather_rows(features), gather_rows(rows))

    def _make_reference(self, conditions: Conditions) -> Reference:
        if isinstance(conditions, PromptCache):
            return Reference(ClipFeatures.load(self.scoring_clip, conditions.prompts), real_images(self.data))
        return reference_for(self.data, self.folder.parent.parent / "classifier")


class RetrievalMonitor:
    """Called with (clip, processor, step): how often it picks the right caption of other images, and its CLIP score.

    Without data (`data.name` empty) it does nothing.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self._pairs: tuple[torch.Tensor, list[str]] | None = None

    def __call__(self, clip: CLIPModel, processor: CLIPProcessor, step: int) -> dict[str, float]:
        if not self.data.name:
            return {}
        if self._pairs is None:
            data = load_data(self.data)
            assert data.texts is not None
            self._pairs = data.images(), data.texts
        images, captions = self._pairs
        features = ClipFeatures(clip, processor, "in training", captions)
        return features.judge(features(images), torch.arange(len(images)))


class ReconstructionMonitor:
    """Called with (tokenizer, step): writes `samples/step-000100.png`, real images above their reconstructions.

    Returns the mean squared error, the FD of the reconstructions where there are labels to train a classifier on, and
    the use and perplexity of the codebook, all over the first 1,000 of the shuffled images.
    """

    def __init__(self, output: Path, data: DataConfig):
        self.folder = output / "samples"
        self.data = data
        self._images: torch.Tensor | None = None
        self._reference: Reference | None = None

    def __call__(self, tokenizer: VQTokenizer, step: int) -> dict[str, float]:
        if self._images is None:
            self._images, labels = self._shuffled_images()
            if len(labels.unique()) > 1:
                self._reference = reference_for(self.data, self.folder.parent.parent / "classifier")
        parts = self._images.split(250)
        tokens = torch.cat([tokenizer.encode(part.to(tokenizer.device)) for part in parts])
        images = torch.cat([tokenizer.decode(part).cpu() for part in tokens.split(250)])
        self.folder.mkdir(parents=True, exist_ok=True)
        pairs = torch.stack([self._images[:40].unflatten(0, (4, 10)), images[:40].unflatten(0, (4, 10))], dim=1)
        image_grid(pairs.flatten(0, 2), 10).save(self.folder / f"step-{step:06d}.png")
        used, perplexity = codebook_use(tokens.cpu(), tokenizer.codebook_size)
        error = (images - self._images).square().mean().item()
        measures = {"mean_squared_error": error, "codebook_used": used, "perplexity": perplexity}
        if self._reference is not None:
            distance, _ = self._reference.features.distance_names
            measures[f"reconstruction_{distance}"] = self._reference.distance(images)
        return measures

    def _shuffled_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = load_data(self.data)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]
        chosen = data.subset(order.tolist())
        return chosen.images(), chosen.labels


def real_images(data: DataConfig) -> torch.Tensor:
    """The real images to compare with: the configured split; of the embedded digits, all."""
    return load_data(replace(data, split="all") if data.name == "digits" else data).images()


def reference_for(
    data: DataConfig, classifier_folder: Path, features: str = "classifier", inception_path: Path | None = None
) -> Reference:
    """The real images, seen through a classifier that is trained on the data and kept in the folder, or "inception".

    The classifier's accuracy is that on a held-out tenth of the split; of the digits, on their test split.
    """
    if features == "inception":
        return Reference(InceptionFeatures(inception_path), real_images(data))
    if data.name == "digits":
        train, test = load_data(replace(data, split="train")), load_data(replace(data, split="test"))
    else:
        train, test = load_data(data).hold_out(0.1)
    return Reference(ClassifierFeatures.cached(classifier_folder, data, train, test), real_images(data))
