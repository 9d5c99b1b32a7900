"""What a training run looks at now and then: a picture of what it makes, and a quick FD."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from transformers import CLIPModel, CLIPProcessor

from distill.loop.host import from_main_process
from eval.clip_score import ClipFeatures
from eval.evaluate import MAX_PIXELS, Features, Reference, batch_size_for, gather_rows, generate, spread
from eval.files import write_picture
from eval.real import data_like, embed, like, make_features, make_reference, obstacle
from students.export import image_grid, sample_grid
from teachers.conditions.condition import Conditions
from teachers.data import DataConfig, ImageData, load_data
from teachers.pipeline import TokenPipeline
from teachers.tokenizers.vq import VQTokenizer, codebook_use

logger = logging.getLogger(__name__)

NUM_IMAGES, NUM_REAL_IMAGES = 1000, 10_000


class SampleMonitor:
    """Called with (pipeline, conditions, step, heartbeat) on every process: writes `samples/step-000100.png`, returns
    FD and class consistency, or CLIP score. The processes share the images, generated and real.

    Real images are read as the pipeline makes its own; settings that contradict this are a ValueError before an image
    is made. Without what measures them (data with labels to train a classifier on; for prompts a CLIP that scores) it
    only writes the samples; for prompts without data (`data.name` empty), or with too few images, there is a CLIP score
    and no FD.
    """

    def __init__(self, output: Path, data: DataConfig, scoring_clip: str = ""):
        self.folder = output / "samples"
        self.data, self.scoring_clip = data, scoring_clip
        self._is_prepared = False
        self._features: Features | None = None
        self._reference: Reference | None = None

    def __call__(
        self, pipeline: TokenPipeline, conditions: Any, step: int, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        if not self._is_prepared:
            self._prepare(pipeline, conditions)
            self._is_prepared = True
        state = PartialState()
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            num_columns = 10 if pipeline.condition_kind == "none" else min(len(conditions), 10)
            columns = conditions.condition(torch.arange(num_columns) % len(conditions), pipeline.device)
            write_picture(self.folder / f"step-{step:06d}.png", sample_grid(pipeline, columns))
        if self._features is None:
            return {}
        found, rows = _shared_features(pipeline, conditions, self._features, heartbeat)
        judge = self._reference or self._features
        return from_main_process(judge.judge(found, rows) if state.is_main_process else None)

    def _prepare(self, pipeline: TokenPipeline, conditions: Any) -> None:
        """Open what there is to measure with."""
        is_text = pipeline.condition_kind == "text"
        if not (self.scoring_clip if is_text else self.data.name and self.data.label_column):
            return
        if is_text:
            captions = conditions.prompts[:NUM_IMAGES]  # what the images go round
            self._features = ClipFeatures.load(self.scoring_clip, captions, pipeline.device)
        if not self.data.name:
            return
        config = like(pipeline, self.data)
        data = data_like(pipeline, config)
        if reason := obstacle(data, to_classifier=not is_text):
            logger.warning("no FD to the images of %s is measured: %s", config.name, reason)
            return
        if self._features is None:
            classifier, names = self.folder.parent.parent / "classifier", pipeline.class_names
            self._features = make_features(config, classifier, device=pipeline.device, class_names=names)
        self._reference = _shared_reference(self._features, data, config.name)


def _shared_reference(features: Features, data: ImageData, name: str) -> Reference:
    """Real images, spread over the data, of which each process reads and embeds its share."""
    state = PartialState()
    share = spread(len(data), NUM_REAL_IMAGES)[state.process_index :: state.num_processes]
    embedded = embed(features, data.subset(share if len(share) else [0]))["features"]  # processes may be more
    real_features = gather_rows(embedded[: len(share)])
    return Reference(features, real_features, f"{len(real_features)} images of {name}")


def _shared_features(
    pipeline: TokenPipeline, conditions: Conditions, features: Features, heartbeat: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of generated images, of which each process makes its share, and the rows of their conditions."""
    state, found, rows = PartialState(), [], []
    for numbers in torch.arange(NUM_IMAGES).split(batch_size_for(pipeline) * state.num_processes):
        heartbeat()  # all processes at once
        share = numbers[state.process_index :: state.num_processes]
        for batch in generate(pipeline, share, conditions=conditions):
            found.append(features(batch.images))
            rows.append(batch.rows)
    return gather_rows(torch.cat(found)), gather_rows(torch.cat(rows))


class RetrievalMonitor:
    """Called with (clip, processor, step): how often it picks the right caption of other images, and its CLIP score.

    Without data (`data.name` empty) it does nothing.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self._pairs: ImageData | None = None

    def __call__(self, clip: CLIPModel, processor: CLIPProcessor, step: int) -> dict[str, float]:
        if not self.data.name:
            return {}
        if self._pairs is None:
            vision: Any = clip.config.vision_config
            data = load_data(replace(self.data, image_size=self.data.image_size or vision.image_size))
            self._pairs = data.subset(spread(len(data), NUM_REAL_IMAGES))
        if len(self._pairs) < 2:  # nothing to pick from
            return {}
        features = ClipFeatures(clip, processor, "in training", self._pairs.texts)
        return features.judge(embed(features, self._pairs)["features"], torch.arange(len(self._pairs)))


class ReconstructionMonitor:
    """Called with (tokenizer, step): writes `samples/step-000100.png`, real images above their reconstructions.

    Returns the mean squared error, the FD of the reconstructions where there are labels to train a classifier on, and
    the use and perplexity of the codebook, all over the first 1,000 of the shuffled images.
    """

    def __init__(self, output: Path, data: DataConfig):
        self.folder = output / "samples"
        self.data = data
        self._chosen: ImageData | None = None
        self._reference: Reference | None = None

    def __call__(self, tokenizer: VQTokenizer, step: int) -> dict[str, float]:
        if self._chosen is None:
            data = load_data(self.data)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]
            self._chosen = data.subset(order)
            if self.data.label_column and (reason := obstacle(data, to_classifier=True)):
                logger.warning("no FD of reconstructions is measured: %s", reason)
            elif self.data.label_column:
                classifier = self.folder.parent.parent / "classifier"
                features = make_features(self.data, classifier, device=tokenizer.device)
                self._reference = make_reference(features, self.data, NUM_REAL_IMAGES)
        shown: list[torch.Tensor] = []
        tokens, found, error = [], [], 0.0
        batch_size = max(1, min(250, MAX_PIXELS // self._chosen[0][0].numel()))
        for images in self._chosen.batches(batch_size):
            tokens.append(tokenizer.encode(images.to(tokenizer.device)))
            decoded = tokenizer.decode(tokens[-1]).cpu()
            error += (decoded - images).square().double().mean().item() * len(images) / len(self._chosen)
            if sum(len(pairs) for pairs in shown) < 40:
                shown.append(torch.stack([images, decoded], dim=1))
            if self._reference is not None:
                found.append(self._reference.features(decoded))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_picture(self.folder / f"step-{step:06d}.png", pairs_grid(torch.cat(shown)[:40]))
        used, perplexity = codebook_use(torch.cat(tokens).cpu(), tokenizer.codebook_size)
        measures = {"mean_squared_error": error, "codebook_used": used, "perplexity": perplexity}
        if self._reference is not None:
            distance, _ = self._reference.features.distance_names
            measures[f"reconstruction_{distance}"] = self._reference.distance(torch.cat(found))
        return measures


def pairs_grid(pairs: torch.Tensor, num_columns: int = 10) -> PIL.Image.Image:
    """Pairs (N, 2, C, H, W) of images side by side, the second under the first; without those of a row begun."""
    num_columns = min(num_columns, len(pairs))
    whole = pairs[: len(pairs) // num_columns * num_columns]
    return image_grid(whole.unflatten(0, (-1, num_columns)).transpose(1, 2).flatten(0, 2), num_columns)
