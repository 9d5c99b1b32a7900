"""Images to learn from: the embedded digits, a `datasets` dataset, parquet files or an image folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from sklearn.datasets import load_digits

from teachers.progress import progress_bar
from teachers.sources.columns import NO_CLASS, WITHOUT_LABELS, captions, check_column, class_labels, renumber
from teachers.sources.dataset import open_dataset, slices
from teachers.sources.pixels import check_colour, read_image

logger = logging.getLogger(__name__)

DIGITS, NUM_TEST_DIGITS = "digits", 297


@dataclass
class DataConfig:
    """Which images, and how they are read."""

    name: str = field(
        default="digits",
        metadata={"help": "digits, a hub dataset's id, a .parquet file, a folder (saved dataset, parquet, images)"},
    )
    split: str = field(
        default="train", metadata={"help": "any that the dataset has, or a part: train[:1000], train[90%:]"}
    )
    image_column: str = field(default="image", metadata={"help": "column with the images"})
    label_column: str = field(default="label", metadata={"help": "column with the class labels; empty: no labels"})
    drop_unlabelled: bool = field(default=False, metadata={"help": "leave out images without a label, else refused"})
    text_column: str = field(default="", metadata={"help": "column with captions, or lists of which the first counts"})
    image_size: int = field(default=0, metadata={"help": "side of the square images; 0 keeps the size as it is"})
    num_channels: int = field(default=1, metadata={"help": "1 for grey images, 3 for colour"})
    background: str = field(
        default="white", metadata={"help": "seen through what is transparent: white, '#rrggbb', ..."}
    )

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 or 3")
        if self.image_size < 0:
            raise ValueError(f"image_size={self.image_size} must be 0 or more")
        check_colour(self.background)


class ImageData(torch.utils.data.Dataset):
    """Images with their class labels, read when they are asked for: `data[i]` -> ((C, H, W) float in [0, 1], label).

    All are of one size; a ValueError names one that is not, or that cannot be read. `rows` gives the images of a list
    of numbers, `to_tensor` maps one of them, `texts` the captions of such a list, if there are any. `labels` (N,) are
    `NO_CLASS` without a label column. `source` is a fingerprint of the rows. `numbers` (N,) are those of the rows that
    are ours; None: all.
    """

    def __init__(
        self,
        rows: Any,
        labels: torch.Tensor,
        class_names: list[str],
        texts: Any,
        to_tensor: Callable[[Any], torch.Tensor],
        source: str,
        numbers: torch.Tensor | None = None,
    ):
        self.rows = rows
        self.labels = labels
        self.class_names = class_names
        self._texts = texts
        self._to_tensor = to_tensor
        self._source = source
        self._numbers = numbers
        self._first = 0 if numbers is None else int(numbers[0])  # the row whose size all have, also those of subsets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, index: list[int]) -> list[tuple[torch.Tensor, int]]:
        # Many rows at once are read ten times as fast as one by one.
        numbers = index if self._numbers is None else self._numbers[index].tolist()
        images = [self._read(number, row) for number, row in zip(numbers, self.rows[numbers], strict=True)]
        for number, image in zip(numbers, images, strict=True):
            if image.shape != self._shape:
                sizes = ["x".join(map(str, shape[:0:-1])) for shape in (image.shape, self._shape)]
                raise ValueError(
                    f"image {number} is of {sizes[0]} pixels, and image {self._first} of {sizes[1]}: "
                    "name the size that all are to have (data.image_size)"
                )
        return [(image, int(self.labels[i])) for image, i in zip(images, index, strict=True)]

    @cached_property
    def _shape(self) -> torch.Size:
        return self._read(self._first, self.rows[[self._first]][0]).shape

    def _read(self, number: int, row: Any) -> torch.Tensor:
        try:
            return self._to_tensor(row)
        except ValueError as error:
            raise ValueError(f"image {number} cannot be read: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Another one for other images, labels, class names or captions, and where the files of these have changed."""
        numbers = b"" if self._numbers is None else self._numbers.numpy().tobytes()
        found = hashlib.sha256(json.dumps([self._source, self.class_names, len(numbers)]).encode())
        found.update(self.labels.numpy().tobytes())
        found.update(numbers)
        return found.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def texts(self) -> Sequence[str] | None:
        """The captions, read when they are asked for; None without a text column."""
        return self._texts if self._texts is None or self._numbers is None else self._texts[self._numbers.tolist()]

    def batches(self, batch_size: int = 256, description: str | None = None, num_workers: int = 0):
        """All images in order, as (B, C, H, W) batches; with a description, under a progress bar.

        Workers are processes that read and decode them.
        """
        loader = torch.utils.data.DataLoader(self, batch_size=batch_size, num_workers=num_workers)
        try:
            for images, _ in progress_bar(loader, desc=description, disable=description is None, unit="batch"):
                yield images
        except ValueError as error:  # a worker's says so at the end of a whole traceback
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error

    def hold_out(self, share: float) -> tuple[ImageData, ImageData]:
        """The images without a random share of them, and that share, always the same one; at least one of each."""
        if len(self) < 2:
            raise ValueError(f"of {len(self)} images none can be held out to measure with; there must be at least 2")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        num_held_out = min(max(round(share * len(self)), 1), len(self) - 1)
        return self.subset(order[num_held_out:]), self.subset(order[:num_held_out])

    def subset(self, index: Sequence[int] | torch.Tensor) -> ImageData:
        """The images of these rows."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        part = copy.copy(self)
        part.labels = self.labels[chosen]
        part._numbers = chosen if self._numbers is None else self._numbers[chosen]
        return part

    def images(self, description: str | None = None) -> torch.Tensor:
        """All images at once, (N, C, H, W)."""
        return torch.cat(list(self.batches(description=description)))


def load_data(config: DataConfig, class_names: Sequence[str] | None = None) -> ImageData:
    """Open the images that the configuration names; ValueError or FileNotFoundError if that fails.

    Labels are numbers into the class names where these are given, as for images that a trained model is compared with.
    """
    if config.name == DIGITS:
        if Path(DIGITS).is_dir():
            logger.warning("%s are scikit-learn's; the folder of that name is ./%s", DIGITS, DIGITS)
        return _load_digits(config, class_names)
    dataset = open_dataset(config.name, config.split, labelled=bool(config.label_column))
    check_column(dataset, config.name, config.image_column)
    labels, names, kept = torch.full((len(dataset),), NO_CLASS), [], None
    if config.label_column:
        labels, names = class_labels(dataset, config.name, config.label_column, class_names)
        kept = _labelled(labels, config)
    if not len(labels if kept is None else kept):
        raise ValueError(f"there are no images in {config.name}")
    return ImageData(
        rows=_images(dataset, config),
        labels=labels if kept is None else labels[kept],
        class_names=names,
        texts=captions(dataset, config.name, config.text_column) if config.text_column else None,
        to_tensor=partial(
            read_image, size=config.image_size, num_channels=config.num_channels, background=config.background
        ),
        source=dataset._fingerprint,  # of our files or the hub's, not of what `datasets` makes of them
        numbers=kept,
    )


def _load_digits(config: DataConfig, class_names: Sequence[str] | None) -> ImageData:
    """scikit-learn's 1,797 real 8x8 digits, shuffled once; the last 297 are the test split, "all" is both."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": order[:-NUM_TEST_DIGITS], "test": order[-NUM_TEST_DIGITS:], "all": order}
    sizes = {split: len(part) for split, part in parts.items()}
    chosen = np.concatenate([parts[split][rows] for split, rows in slices(config.split, DIGITS, sizes)])
    rows = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
    classes, names = torch.full((len(chosen),), NO_CLASS), []
    if config.label_column:
        digits = [str(digit) for digit in range(10)]
        classes, names = renumber(torch.from_numpy(labels[chosen]), digits, class_names, DIGITS)
    source = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return ImageData(rows, classes, names, None, lambda row: row, source)


def _images(dataset: datasets.Dataset, config: DataConfig) -> Any:
    """The column of images, which are decoded one by one: one that cannot be is then named."""
    try:
        column = dataset.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"column {config.image_column!r} of {config.name} does not hold images: {error}") from error
    return column[config.image_column]


def _labelled(labels: torch.Tensor, config: DataConfig) -> torch.Tensor | None:
    """The rows with a label; None, if all have one."""
    missing = labels == NO_CLASS
    if not missing.any():
        return None
    if not config.drop_unlabelled:
        raise ValueError(
            f"{int(missing.sum())} of {len(labels)} rows of {config.name} have no label; the first is row "
            f"{int(missing.nonzero()[0])}; data.drop_unlabelled=true leaves them out{WITHOUT_LABELS}"
        )
    return (~missing).nonzero().flatten()
