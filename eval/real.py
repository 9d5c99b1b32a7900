"""Real images as a feature network sees them: read as a pipeline makes its own, a few at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import PIL.ImageMode
import torch

from distill.config import load_config
from eval.classifier import ClassifierFeatures
from eval.evaluate import MAX_PIXELS, Features, Reference, spread
from eval.inception import InceptionFeatures
from teachers.data import DIGITS, NO_CLASS, DataConfig, ImageData, load_data
from teachers.pipeline import ImageTokenizer, TokenPipeline

MIN_REAL = 10  # of which a tenth is an image
NUM_LOOKED_AT = 8

logger = logging.getLogger(__name__)


def image_shape(tokenizer: ImageTokenizer) -> tuple[int, ...]:
    """(C, H, W) of the images that a tokenizer decodes."""
    height, width = tokenizer.token_grid
    return tuple(tokenizer.decode(torch.zeros(1, height * width, dtype=torch.int64, device=tokenizer.device)).shape[1:])


def settings_like(pipeline: TokenPipeline, overrides: Sequence[str]) -> DataConfig:
    """The settings that a command line names; what it does not name of size and colours follows the pipeline.

    Of the embedded digits they are all images, unless it names a split.
    """
    num_channels, height, width = image_shape(pipeline.tokenizer)
    own = [f"num_channels={num_channels}", *([f"image_size={height}"] if height == width else [])]
    if load_config(DataConfig, overrides=overrides).name == DIGITS:
        own.append("split=all")
    return load_config(DataConfig, overrides=[*own, *overrides])


def names_size(overrides: Sequence[str]) -> bool:
    """Whether a command line says itself of which size images are read."""
    return any(override.startswith("image_size=") for override in overrides)


def like(pipeline: TokenPipeline, config: DataConfig) -> DataConfig:
    """A configuration's settings; what it leaves at its default of size and colours follows the pipeline.

    Of the embedded digits they are all images, unless it names another split than the default.
    """
    num_channels, height, width = image_shape(pipeline.tokenizer)
    return replace(
        config,
        split="all" if (config.name, config.split) == (DIGITS, DataConfig.split) else config.split,
        image_size=config.image_size or (height if height == width else 0),
        num_channels=max(config.num_channels, num_channels),  # grey is the default
    )


def data_like(pipeline: TokenPipeline, config: DataConfig, may_enlarge: bool = True) -> ImageData:
    """The real images to compare a pipeline's with, their labels numbered as its classes are.

    ValueError where they are of another size, other colours, or another number of classes that have no names, and
    where they are smaller than they are read, unless that may be.
    """
    data, shape = load_data(config, pipeline.class_names), image_shape(pipeline.tokenizer)
    check_shape(data, shape, config.name)
    if other := [raw for raw in raw_shapes(data) if raw != shape]:
        smallest = min(other, key=lambda raw: min(raw[1:]))
        if min(smallest[1:]) < config.image_size and not may_enlarge:
            raise ValueError(
                f"an image of {config.name} is of {describe_shape(smallest)} and would be enlarged to "
                f"{describe_shape(shape)}; if that is meant, say image_size={config.image_size}"
            )
        logger.warning(
            "real images of %s are cropped, resized or recoloured: from %s, for instance, to %s",
            config.name, describe_shape(other[0]), describe_shape(shape),
        )  # fmt: skip
    is_nameless = pipeline.condition_kind == "classes" and pipeline.class_names is None
    if is_nameless and data.num_classes not in (0, pipeline.num_classes):
        raise ValueError(
            f"{config.name} has {data.num_classes} classes and the pipeline {pipeline.num_classes}, of which it has no "
            "names: a label would be another class. Compare with images of all its classes, or without labels "
            "(label_column=)"
        )
    return data


def check_shape(data: ImageData, shape: tuple[int, ...], name: str) -> None:
    """A ValueError where one of a few images, spread over the data, has not the shape (C, H, W)."""
    for image, _ in data.__getitems__(spread(len(data), NUM_LOOKED_AT).tolist()):
        if tuple(image.shape) != shape:
            raise ValueError(
                f"an image of {name} is read as {describe_shape(tuple(image.shape))}, where images of "
                f"{describe_shape(shape)} are wanted (image_size and num_channels say how images are read)"
            )


def raw_shapes(data: ImageData) -> list[tuple[int, ...]]:
    """(C, H, W) of a few images, spread over the data, as they were saved."""
    numbers = spread(len(data), NUM_LOOKED_AT)
    rows = data.rows[(numbers if data._numbers is None else data._numbers[numbers]).tolist()]
    if isinstance(rows, torch.Tensor):  # the embedded digits
        return [tuple(row.shape) for row in rows]
    images = [datasets.Image().decode_example(row) for row in rows]
    grey = [PIL.ImageMode.getmode(image.mode).basemode == "L" for image in images]
    return [(1 if is_grey else 3, image.height, image.width) for is_grey, image in zip(grey, images, strict=True)]


def describe_shape(shape: tuple[int, ...]) -> str:
    num_channels, height, width = shape
    return f"{height}x{width} in {'colour' if num_channels == 3 else 'grey'}"


def embed(features: Features, data: ImageData, description: str | None = None) -> dict[str, torch.Tensor]:
    """The "features" (N, D) of all images, and the SHA-256 of the bytes (N, 32) of each, as "digests"."""
    batch_size = max(1, min(256, MAX_PIXELS // data[0][0].numel()))
    found, digests = [], []
    for images in data.batches(batch_size, description):
        found.append(features(images))
        pixels = (255 * images).round().byte().numpy()
        digests += [list(hashlib.sha256(image.tobytes()).digest()) for image in pixels]
    return {"features": torch.cat(found), "digests": torch.tensor(digests, dtype=torch.uint8)}


def describe(name: str, digests: torch.Tensor) -> str:
    """Which images they are: how many, of what, and the SHA-256 of their digests (N, 32) in order."""
    return f"{len(digests)} images of {name}, sha256 {hashlib.sha256(digests.numpy().tobytes()).hexdigest()}"


def make_reference(features: Features, config: DataConfig, num_images: int | None = None) -> Reference:
    """The real images seen through the features: all, or so many that are spread over them."""
    data = load_data(config)
    if num_images is not None:
        data = data.subset(spread(len(data), num_images))
    found = embed(features, data, "real images")
    return Reference(features, found["features"], describe(config.name, found["digests"]))


def obstacle(data: ImageData, *, to_classifier: bool) -> str | None:
    """Why there can be no Fréchet distance to the images (by a classifier that is trained on them), if so."""
    if len(data) < MIN_REAL:
        return f"there are {len(data)} images, and at least {MIN_REAL} are needed"
    num_classes = len(data.labels[data.labels != NO_CLASS].unique())
    if to_classifier and num_classes < 2:
        return f"a classifier needs labels of at least two classes, and the images have {num_classes}"
    return None


def make_features(
    config: DataConfig,
    classifier_folder: Path,
    kind: str = "classifier",
    inception_path: Path | None = None,
    device: torch.device | str = "cpu",
    class_names: Sequence[str] | None = None,
) -> Features:
    """A classifier that is trained on the data and kept in the folder, or "inception".

    The classifier's accuracy is that on a held-out tenth of the split; of the digits, on their test split. Images that
    none can be trained on are a ValueError.
    """
    if kind == "inception":
        return InceptionFeatures(inception_path, device)
    data = load_data(config, class_names)
    if reason := obstacle(data, to_classifier=True):
        raise ValueError(
            f"no classifier to measure with can be trained on {config.name}: {reason} (Inception features need none: "
            "--features inception)"
        )
    train, test = data.hold_out(0.1)
    if config.name == DIGITS:
        train, test = (load_data(replace(config, split=split), class_names) for split in ("train", "test"))
    return ClassifierFeatures.cached(classifier_folder, config, train, test, device)
