"""Real images as a feature network sees them, read a few at a time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from eval.classifier import ClassifierFeatures
from eval.evaluate import MAX_PIXELS, Features, Reference, spread
from eval.inception import InceptionFeatures
from teachers.data import DataConfig, ImageData, load_data


def real_data(config: DataConfig) -> ImageData:
    """The real images to compare with: the configured split; of the embedded digits, all."""
    return load_data(replace(config, split="all") if config.name == "digits" else config)


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
    data = real_data(config)
    if num_images is not None:
        data = data.subset(spread(len(data), num_images))
    found = embed(features, data, "real images")
    return Reference(features, found["features"], describe(config.name, found["digests"]))


def make_features(
    data: DataConfig,
    classifier_folder: Path,
    kind: str = "classifier",
    inception_path: Path | None = None,
    device: torch.device | str = "cpu",
) -> Features:
    """A classifier that is trained on the data and kept in the folder, or "inception".

    The classifier's accuracy is that on a held-out tenth of the split; of the digits, on their test split.
    """
    if kind == "inception":
        return InceptionFeatures(inception_path, device)
    if data.name == "digits":
        train, test = load_data(replace(data, split="train")), load_data(replace(data, split="test"))
    else:
        train, test = load_data(data).hold_out(0.1)
    return ClassifierFeatures.cached(classifier_folder, data, train, test, device)
