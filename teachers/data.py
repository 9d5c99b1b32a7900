"""Images to learn from: the embedded digits, a `datasets` dataset, parquet files or an image folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits

from teachers.progress import progress_bar

NUM_TEST_DIGITS = 297
NO_CLASS = -1  # in place of a label


@dataclass
class DataConfig:
    """Which images, and how they are read."""

    name: str = field(
        default="digits",
        metadata={"help": "digits, a hub dataset's id, a .parquet file, a folder (saved dataset, parquet, images)"},
    )
    split: str = field(default="train", metadata={"help": "train or test, or any split that the dataset has"})
    image_column: str = field(default="image", metadata={"help": "column with the images"})
    label_column: str = field(default="label", metadata={"help": "column with the class labels; empty: no labels"})
    text_column: str = field(default="", metadata={"help": "column with captions; empty: none"})
    image_size: int = field(default=0, metadata={"help": "side of the square images; 0 keeps the size as it is"})
    num_channels: int = field(default=1, metadata={"help": "1 for grey images, 3 for colour"})

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 or 3")
        if self.image_size < 0:
            raise ValueError(f"image_size={self.image_size} must be 0 or more")


class ImageData(torch.utils.data.Dataset):
    """Images with their class labels, read when they are asked for: `data[i]` -> ((C, H, W) float in [0, 1], label).

    `rows` gives the images of a list of numbers, `to_tensor` maps one of them, `texts` the captions of such a list, if
    there are any. `labels` (N,) are `NO_CLASS` without a label column. `numbers` (N,) are those of the rows that are
    ours; None: all.
    """

    def __init__(
        self,
        rows: Any,
        labels: torch.Tensor,
        class_names: list[str],
        texts: Any,
        to_tensor: Callable[[Any], torch.Tensor],
        numbers: torch.Tensor | None = None,
    ):
        self.rows = rows
        self.labels = labels
        self.class_names = class_names
        self._texts = texts
        self._to_tensor = to_tensor
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, index: list[int]) -> list[tuple[torch.Tensor, int]]:
        # Many rows at once are read ten times as fast as one by one.
        numbers = index if self._numbers is None else self._numbers[index].tolist()
        try:
            rows = self.rows[numbers]
        except (PIL.Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"one of the images {numbers[0]} to {numbers[-1]} cannot be read: {error}") from error
        return [(self._to_tensor(row), int(self.labels[i])) for row, i in zip(rows, index, strict=True)]

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
        for images, _ in progress_bar(loader, desc=description, disable=description is None, unit="batch"):
            yield images

    def hold_out(self, share: float) -> tuple[ImageData, ImageData]:
        """The images without a random share of them, and that share; always the same one."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        num_held_out = round(share * len(self))
        return self.subset(order[num_held_out:]), self.subset(order[:num_held_out])

    def subset(self, index: Sequence[int] | torch.Tensor) -> ImageData:
        """The images of these rows."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        numbers = chosen if self._numbers is None else self._numbers[chosen]
        return ImageData(self.rows, self.labels[chosen], self.class_names, self._texts, self._to_tensor, numbers)

    def images(self, description: str | None = None) -> torch.Tensor:
        """All images at once, (N, C, H, W)."""
        return torch.cat(list(self.batches(description=description)))


def load_data(config: DataConfig) -> ImageData:
    """Open the images that the configuration names; ValueError or FileNotFoundError if that fails."""
    if config.name == "digits":
        return _load_digits(config.split, labelled=bool(config.label_column))
    dataset = open_dataset(config.name, config.split)
    columns = [config.image_column, config.label_column, config.text_column]
    for column in filter(None, columns):
        if column not in dataset.column_names:
            hint = "; images without labels are read with label_column=" if column == config.label_column else ""
            raise ValueError(f"{config.name} has no column {column!r}; it has {', '.join(dataset.column_names)}{hint}")
    labels, class_names = _class_labels(dataset, config.label_column)
    return ImageData(
        rows=dataset.cast_column(config.image_column, datasets.Image())[config.image_column],
        labels=labels,
        class_names=class_names,
        texts=dataset[config.text_column] if config.text_column else None,
        to_tensor=partial(image_to_tensor, size=config.image_size, num_channels=config.num_channels),
    )


def _load_digits(split: str, labelled: bool) -> ImageData:
    """scikit-learn's 1,797 real 8x8 digits, shuffled once; the last 297 are the test split, "all" is both."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": order[:-NUM_TEST_DIGITS], "test": order[-NUM_TEST_DIGITS:], "all": order}
    if split not in parts:
        raise ValueError(f"digits has no split {split!r}; it has {', '.join(parts)}")
    chosen = parts[split]
    rows = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
    names = [str(digit) for digit in range(10)] if labelled else []
    classes = torch.from_numpy(labels[chosen]) if labelled else torch.full((len(chosen),), NO_CLASS)
    return ImageData(rows, classes, names, None, lambda row: row)


def open_dataset(name: str, split: str) -> datasets.Dataset:
    """A parquet file, a folder (saved dataset, parquet, images) or a hub dataset, by its id."""
    path = Path(name)
    if path.suffix == ".parquet" and not path.is_file():
        raise FileNotFoundError(f"there is no parquet file {name}")
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
    if (path / "state.json").is_file():
        return datasets.load_from_disk(path)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
        return splits[split]
    if path.is_dir():
        files = sorted(map(str, path.glob(f"{split}*.parquet")))
        if files:
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        if any(path.glob("*.parquet")):
            raise ValueError(f"{name} has no parquet file for split {split!r} ({split}*.parquet)")
        return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
    try:
        return datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name!r} is neither a local file or folder nor a hub dataset within reach") from error


def _class_labels(dataset: datasets.Dataset, column: str) -> tuple[torch.Tensor, list[str]]:
    if not column:
        return torch.full((len(dataset),), NO_CLASS), []
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return torch.tensor(dataset.with_format("numpy")[column][:]), feature.names
    values = dataset[column][:]
    names = sorted(set(values))
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[value] for value in values]), [str(name) for name in names]


def image_to_tensor(image: PIL.Image.Image, size: int = 0, num_channels: int = 3) -> torch.Tensor:
    """A (C, H, W) float tensor in [0, 1]; with a size, the centre square of the image resized to it."""
    image = image.convert("L" if num_channels == 1 else "RGB")
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(image.height, image.width, num_channels).permute(2, 0, 1) / 255
