"""Data sets wherever they lie: parquet files, folders that were saved or that hold images, the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import datasets
import pyarrow

from teachers.sources.image_folder import METADATA, image_splits

Opener = Callable[[], datasets.Dataset]

SHARD = re.compile(r"(.+?)(-\d+(-of-\d+(-\w+)?)?)?\.parquet")  # of a split: train, train-00000-of-00002
DECLARED = re.compile(r"---\n((?!---).*\n)*?configs:")  # at the head of a README.md: which files belong to which split


def open_dataset(name: str, split: str) -> datasets.Dataset:
    """The rows of a split, or of a part of one ("train[:100]"), of a parquet file, a folder or a hub data set.

    Raises FileNotFoundError where there is none of that name, and ValueError where it lacks the split.
    """
    path = Path(name)
    if path.suffix == ".parquet" and not path.is_file():
        raise FileNotFoundError(f"there is no parquet file {name}")
    try:
        if path.is_file():
            return _take(split, name, {part: partial(_parquet, part, [path]) for part in _named(split)})
        if (path / "state.json").is_file():
            return _take(split, name, {part: partial(datasets.load_from_disk, path) for part in _named(split)})
        if splits := _splits_of_folder(path):
            return _take(split, name, splits)
        return datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name!r} is neither a local file or folder nor a hub dataset within reach") from error
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError) as error:
        raise FileNotFoundError(f"{name} holds no parquet files, no saved data set and no images") from error


def slices(split: str, name: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The splits and their rows that an expression such as "train[:10%]+test" stands for, as `datasets` reads it."""
    _check_known(split, name, sizes)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    return [(part.splitname, range(sizes[part.splitname])[part.from_ : part.to]) for part in parts]


def _take(split: str, name: str, splits: Mapping[str, Opener]) -> datasets.Dataset:
    _check_known(split, name, splits)
    whole = {part: splits[part]() for part in _named(split)}
    taken = [
        whole[part] if len(rows) == len(whole[part]) else whole[part].select(rows)
        for part, rows in slices(split, name, {part: len(rows) for part, rows in whole.items()})
    ]
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def _named(split: str) -> list[str]:
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def _check_known(split: str, name: str, known: Iterable[str]) -> None:
    for part in _named(split):
        if part not in known:
            raise ValueError(f"{name} has no split {part!r}; it has {', '.join(known)}")


def _splits_of_folder(path: Path) -> dict[str, Opener]:
    """What opens each split of a folder; nothing where it is none, or one that only `datasets` knows how to read."""
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        return {split: partial(saved.get, split) for split in saved}
    card = path / "README.md"
    if not path.is_dir() or (card.is_file() and DECLARED.match(card.read_text(encoding="utf-8", errors="replace"))):
        return {}
    shards: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*.parquet"), *(path / "data").glob("*.parquet")]):
        if file.name not in METADATA and (shard := SHARD.fullmatch(file.name)):
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return {split: partial(_parquet, split, files) for split, files in shards.items()}
    return image_splits(path)


def _parquet(split: str, files: list[Path]) -> datasets.Dataset:
    names = [glob.escape(str(file)) for file in files]
    return datasets.load_dataset("parquet", data_files={split: names}, split=split)
