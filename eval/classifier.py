"""A small classifier trained on the data at hand, whose features and labels measure generated images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from eval.evaluate import identify
from teachers.component import weights_digest
from teachers.data import NO_CLASS, DataConfig, ImageData
from teachers.folder import new_folder
from teachers.progress import progress_bar
from teachers.sharing import each_once

FEATURE_SIZE = 64
DESCRIPTION = "training.json"  # beside the weights: what they were trained on
READ_AS = ("split", "image_size", "num_channels")  # settings that the images themselves tell
MAX_KEPT = 2**26  # numbers of training images that are kept in memory (256 MiB); of more, what is drawn is read


class Classifier(ModelMixin, ConfigMixin):
    """A convolutional network: images (B, C, H, W) in [0, 1] -> class logits (B, K), with 64-d features before them."""

    @register_to_config
    def __init__(self, num_channels: int, num_classes: int, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(2 * width * 16, FEATURE_SIZE),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURE_SIZE, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 64)."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class ClassifierFeatures:
    """The feature network of FD and the judge of class consistency."""

    distance_names = ("fd", "kd")

    def __init__(self, classifier: Classifier, test_accuracy: float, data: str):
        self.classifier = classifier.eval().requires_grad_(False)
        self.test_accuracy = test_accuracy
        self.name = (
            f"{FEATURE_SIZE}-d features of a small classifier of {data} (test accuracy {test_accuracy:.3f}, weights "
            f"{weights_digest(classifier)[:12]})"
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 64) of images (N, C, H, W) in [0, 1]."""
        parts = images.to(self.classifier.device).split(1024)
        return torch.cat([self.classifier.features(part) for part in parts]).cpu()

    @torch.no_grad()
    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        """The share of features (N, 64) that speak for the class of the image; nothing of images without one."""
        if (rows == NO_CLASS).any():
            return {}
        predicted = self.classifier.head(features.to(self.classifier.device)).argmax(-1).cpu()
        return {"class_consistency": (predicted == rows).double().mean().item()}

    @classmethod
    def cached(
        cls,
        folder: Path,
        config: DataConfig,
        train: ImageData,
        test: ImageData,
        device: torch.device | str = "cpu",
    ) -> ClassifierFeatures:
        """The classifier that was trained on this data, in a folder of its own in `folder`; if there is none it is
        trained and kept there, by one of the processes that want it."""
        # Of size and colours, what they come to: an image of 8x8 is the same with image_size=8 as without.
        settings = {key: value for key, value in asdict(config).items() if key not in READ_AS}
        wanted = {
            "data": settings | {"image_shape": list(train[0][0].shape)},
            "trained_on": identify(train),
        }
        kept = folder / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
        for path in each_once([kept]):
            classifier, accuracy = train_classifier(train, test, device)
            with new_folder(path, shared=True) as staging:
                classifier.save_pretrained(staging)
                (staging / DESCRIPTION).write_text(json.dumps(wanted | {"test_accuracy": accuracy}, indent=2))
        accuracy = json.loads((kept / DESCRIPTION).read_text())["test_accuracy"]
        return cls(Classifier.from_pretrained(kept).to(device), accuracy, config.name)


def train_classifier(
    train: ImageData,
    test: ImageData,
    device: torch.device | str = "cpu",
    *,
    num_steps: int = 600,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[Classifier, float]:
    """A classifier trained with small random shifts, and its accuracy on the test images."""
    num_channels, height, width = train[0][0].shape
    kept = train.images() if len(train) * num_channels * height * width <= MAX_KEPT else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(num_channels, train.num_classes).to(device).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
        for _ in progress_bar(range(num_steps), desc="classifier", unit="step"):
            rows = torch.randint(len(train), (batch_size,))
            if kept is not None:
                images = kept[rows]
            else:
                images = torch.stack([image for image, _ in train.__getitems__(rows.tolist())])
            shifted = _shift(images.to(device), *torch.randint(-1, 2, (2,)).tolist())
            F.cross_entropy(classifier(shifted), train.labels[rows].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.eval()
    with torch.no_grad():
        predicted = torch.cat([classifier(part.to(device)).argmax(-1).cpu() for part in test.batches()])
    return classifier, (predicted == test.labels).float().mean().item()


def _shift(images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[..., 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]
