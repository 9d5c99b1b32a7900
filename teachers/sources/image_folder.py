"""Folders of images: their subfolders say which splits and classes they hold; names of files never do."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow

from teachers.sources.columns import natural_order
from teachers.sources.files import fingerprint

logger = logging.getLogger(__name__)

Parts = tuple[str, ...]  # of a path below the folder

SPLIT_OF = {
    folder: split
    for split, folders in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for folder in folders
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # rows for images, with captions and the like


def image_splits(folder: Path, labelled: bool = True) -> dict[str, Callable[[], datasets.Dataset]]:
    """What opens each split of a folder of images; nothing where it holds none.

    Images in folders of classes have a "label", numbered alike in all splits; metadata files give the columns that
    they hold instead. What is left out is reported. A ValueError where folders are not classes, and they are wanted.
    """
    files: dict[str, list[Parts]] = {"images": [], "metadata": [], "others": []}
    suffixes = {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in PIL.Image.OPEN}
    for path in _files_below(folder):
        is_image = os.path.splitext(path[-1])[1].lower() in suffixes
        files["images" if is_image else "metadata" if path[-1] in METADATA else "others"].append(path)
    images, metadata = files["images"], files["metadata"]
    if not images:
        return {}
    layout = _layout(folder, images)
    images_of, metadata_of = (_by_split(paths, layout) for paths in (images, metadata))
    _report(folder, files["others"], "are no images")
    _report(folder, images_of.pop(None, []), "are in no split")
    _report(folder, metadata_of.pop(None, []), "are in no split; move each into the folder of its split")
    classes = _classes(folder, images_of, layout) if labelled and not metadata_of else {}
    return {
        split: partial(_with_metadata, folder, paths, metadata_of[split], split)
        if split in metadata_of
        else partial(_with_labels, folder, paths, classes.get(split, []), layout)
        for split, paths in images_of.items()
    }


@dataclass(frozen=True)
class Layout:
    """Where the splits and classes of a folder are: below `root`, which all images lie in; splits first, if any.

    Each class may have its images in a folder called images, as in Tiny ImageNet.
    """

    root: Parts
    has_splits: bool
    has_images_folders: bool

    def split(self, path: Parts) -> str | None:
        """The split that a file belongs to, if any."""
        if not self.has_splits:
            return "train"
        below = path[len(self.root) :] if path[: len(self.root)] == self.root else ()
        return SPLIT_OF.get(below[0].lower()) if len(below) > 1 else None

    def classes(self, path: Parts) -> Parts:
        """The folders that an image lies in, below its split."""
        return path[len(self.root) + self.has_splits : -2 if self.has_images_folders else -1]


def _layout(folder: Path, images: list[Parts]) -> Layout:
    parents = {path[:-1] for path in images}
    shared = Path(os.path.commonpath(map("/".join, parents))).parts
    named = [number for number, name in enumerate(shared) if name.lower() in SPLIT_OF]
    root = shared[: named[0]] if named else shared
    below = [path[len(root) :] for path in parents]
    folders = {path[0] for path in below if path}
    named_as_splits = {name for name in folders if name.lower() in SPLIT_OF}
    # One of classes may be called train: splits are alone, or several, or hold classes themselves.
    has_splits = bool(named_as_splits) and (
        named_as_splits == folders
        or len({SPLIT_OF[name.lower()] for name in named_as_splits}) > 1
        or any(len(path) > 1 and path[0] in named_as_splits for path in below)
    )
    if named_as_splits and not has_splits:
        logger.warning("%s: %s is taken for a class, as are the folders beside it", folder, _listed(named_as_splits))
    return Layout(root, has_splits, all(path[-1:] and path[-1].lower() == "images" for path in parents))


def _by_split(paths: list[Parts], layout: Layout) -> dict[str | None, list[Parts]]:
    found: dict[str | None, list[Parts]] = {}
    for path in paths:
        found.setdefault(layout.split(path), []).append(path)
    return found


def _classes(folder: Path, images_of: dict[str | None, list[Parts]], layout: Layout) -> dict[str | None, list[str]]:
    """The names of the classes in order, the same for each split whose images are sorted into folders of them."""
    names: set[str] = set()
    sorted_splits = []
    for split, images in images_of.items():
        folders = {layout.classes(path) for path in images}
        depths = {len(path) for path in folders}
        if len(depths) > 1:
            logger.warning("%s: the images have no labels, since some lie in folders and others beside these", folder)
        elif depths != {0}:
            sorted_splits.append(split)
            names |= {path[-1] for path in folders}
            if depths != {1} and all(path[-1].lower() in SPLIT_OF for path in folders):
                raise ValueError(
                    f"{folder} has splits ({_listed(names)}) below its classes; expected SPLIT/CLASS/image"
                )
            if len({path[-1] for path in folders}) < len(folders):
                raise ValueError(
                    f"{folder} has folders of the same name in several others ({'/'.join(min(folders))}, ...), which "
                    "are no classes; expected CLASS/image or SPLIT/CLASS/image"
                )
    classes = sorted(names, key=natural_order) if len(names) > 1 else []
    return dict.fromkeys(sorted_splits, classes)


def _with_labels(folder: Path, images: list[Parts], classes: list[str], layout: Layout) -> datasets.Dataset:
    found, base = _fingerprint(folder, images), os.path.abspath(folder)
    paths = [f"{base}/{'/'.join(path)}" for path in images]
    features = {"image": datasets.Image()}
    columns = {
        "image": pyarrow.StructArray.from_arrays([pyarrow.nulls(len(paths), "binary"), paths], ["bytes", "path"])
    }
    if classes:
        number = {name: number for number, name in enumerate(classes)}
        features["label"] = datasets.ClassLabel(names=classes)
        columns["label"] = pyarrow.array(np.array([number[layout.classes(path)[-1]] for path in images]))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pyarrow.table(columns), info=info, fingerprint=found)


def _with_metadata(folder: Path, images: list[Parts], metadata: list[Parts], split: str) -> datasets.Dataset:
    found = _fingerprint(folder, images + metadata)
    files = [glob.escape(os.path.join(os.path.abspath(folder), *path)) for path in metadata]
    rows = datasets.load_dataset("imagefolder", data_files={split: files}, split=split)
    if len(rows) < len(images):
        logger.warning("%s: left out are %d images that no metadata names", folder, len(images) - len(rows))
    return datasets.Dataset(rows.data, info=rows.info, fingerprint=found)


def _fingerprint(folder: Path, files: list[Parts]) -> str:
    return fingerprint(folder, map("/".join, files))


def _files_below(folder: Path) -> list[Parts]:
    """All files but hidden ones, in the order of their paths; through links, but to no folder that they lie in."""
    found: list[Parts] = []
    entered = {str(folder): {_identity(folder)}}  # on the way to each folder, and itself
    for parent, folders, names in os.walk(folder, followlinks=True):
        parts, way = Path(parent).relative_to(folder).parts, entered[parent]
        shown = [name for name in folders if not name.startswith((".", "__"))]
        identities = {name: _identity(os.path.join(parent, name)) for name in shown}
        folders[:] = [name for name in shown if identities[name] not in way]
        entered |= {os.path.join(parent, name): way | {identities[name]} for name in folders}
        found += [(*parts, name) for name in names if not name.startswith(".")]
    return sorted(found, key="/".join)


def _identity(folder: Path | str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _report(folder: Path, files: list[Parts], reason: str) -> None:
    if files:
        logger.warning("%s: left out are %d files that %s, as %s", folder, len(files), reason, "/".join(files[0]))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
