"""Data sets wherever they lie: parquet files, folders that were saved or that hold images, the hub."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import datasets
import pyarrow

from teachers.sources.files import fingerprint
from teachers.sources.image_folder import METADATA, image_splits

Opener = Callable[[], datasets.Dataset]

SHARD = re.compile(r"(.+?)[-_.]\d+-of-\d+(-\w+)?")  # of a split: train-00000-of-00002
NUMBERED = re.compile(r"(.+?)([-_.])(\d+)")  # a shard as well, where the others are there: train_0, train_1
UNNAMED = re.compile(r"\d+|part-\d+.*")  # as img2dataset and Spark name theirs
DECLARED = re.compile(r"---\n((?!---).*\n)*?configs:")  # at the head of a README.md: which files belong to which split


def open_dataset(name: str, split: str, labelled: bool = True) -> datasets.Dataset:
    """The rows of a split, or of a part of one ("train[:100]"), of a parquet file, a folder or a hub data set.

    Their fingerprint is that of the files which were given, wherever `datasets` keeps its own. Raises FileNotFoundError
    where there is none of that name, and ValueError where it lacks the split, or `labelled` images are not sorted.
    """
    path = Path(name)
    if path.suffix == ".parquet" and not path.is_file():
        raise FileNotFoundError(f"there is no parquet file {name}")
    try:
        if path.is_file():
            return _take(split, name, {part: partial(_parquet, path.parent, [path]) for part in _named(split)})
        if (path / "state.json").is_file():
            return _take(split, name, {part: partial(_saved, path, None) for part in _named(split)})
        if splits := _splits_of_folder(path, labelled):
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
    if split in sizes:  # by a name that `datasets` would not have, as coco-2017
        return [(split, range(sizes[split]))]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    return [(part.splitname, range(sizes[part.splitname])[part.from_ : part.to]) for part in parts]


def _take(split: str, name: str, splits: Mapping[str, Opener]) -> datasets.Dataset:
    _check_known(split, name, splits)
    whole = {part: splits[part]() for part in _named(split)}
    taken = [
        whole[part] if len(rows) == len(whole[part]) else whole[part].select(rows)
        for part, rows in slices(split, name, {part: len(rows) for part, rows in whole.items()})
    ]
    if len(taken) == 1:
        return taken[0]
    return _known_as(datasets.concatenate_datasets(taken), [part._fingerprint for part in taken])


def _named(split: str) -> list[str]:
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def _check_known(split: str, name: str, known: Iterable[str]) -> None:
    for part in _named(split):
        if part not in known:
            hint = "; name=FILE.parquet reads one file, whatever its name" if _parquet_files(Path(name)) else ""
            raise ValueError(f"{name} has no split {part!r}; it has {', '.join(known)}{hint}")


def _splits_of_folder(path: Path, labelled: bool) -> dict[str, Opener]:
    """What opens each split of a folder; nothing where it is none, or one that only `datasets` knows how to read."""
    if (path / "dataset_dict.json").is_file():
        return {split: partial(_saved, path, split) for split in datasets.load_from_disk(path)}
    card = path / "README.md"
    if not path.is_dir() or (card.is_file() and DECLARED.match(card.read_text(encoding="utf-8", errors="replace"))):
        return {}
    if shards := _shards(_parquet_files(path)):
        return {split: partial(_parquet, path, files) for split, files in shards.items()}
    return image_splits(path, labelled)


def _parquet_files(path: Path) -> list[Path]:
    files = sorted([*path.glob("*.parquet"), *(path / "data").glob("*.parquet")])
    return [file for file in files if file.name not in METADATA]


def _shards(files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split, in order."""
    numbered: dict[tuple[str, ...], list[int]] = {}
    for file in files:
        if found := NUMBERED.fullmatch(file.stem):
            numbered.setdefault((str(file.parent), found[1], found[2]), []).append(int(found[3]))
    shards: dict[str, list[Path]] = {}
    for file in files:
        split = file.stem
        if UNNAMED.fullmatch(split):
            split = "train"
        elif found := SHARD.fullmatch(split):
            split = found[1]
        elif found := NUMBERED.fullmatch(split):
            numbers = sorted(numbered[str(file.parent), found[1], found[2]])
            first = numbers[0]
            if first in ((0, 1) if len(numbers) > 1 else (0,)) and numbers == [*range(first, first + len(numbers))]:
                split = found[1]
        shards.setdefault(split, []).append(file)
    return shards


def _parquet(folder: Path, files: list[Path]) -> datasets.Dataset:
    found = fingerprint(folder, [str(file.relative_to(folder)) for file in files])
    names = [glob.escape(str(file)) for file in files]
    rows = datasets.load_dataset("parquet", data_files={"train": names}, split="train")
    return _known_as(rows, [found])


def _saved(folder: Path, split: str | None) -> datasets.Dataset:
    """One that says of itself what its rows are, but not whether its files have been replaced."""
    saved = datasets.load_from_disk(folder if split is None else folder / split)
    files = [os.path.relpath(file["filename"], folder) for file in saved.cache_files]
    return _known_as(saved, [saved._fingerprint, fingerprint(folder, files)])


def _known_as(rows: datasets.Dataset, fingerprints: list[str]) -> datasets.Dataset:
    rows._fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16]
    return rows
