"""Columns of a data set as what is learnt from: labels as numbers of classes, captions as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets
import pyarrow
import torch
from pyarrow import compute

NO_CLASS = -1  # in place of a label
WITHOUT_LABELS = "; images without labels are read with label_column="


def check_column(dataset: datasets.Dataset, name: str, column: str, hint: str = "") -> None:
    """A ValueError where the data set of that name has no such column."""
    if column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(dataset.column_names)}{hint}")


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by in which numbers are numbers: 2 before 10, and image9 before image10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def class_labels(
    dataset: datasets.Dataset, name: str, column: str, class_names: Sequence[str] | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Labels (N,), `NO_CLASS` where a row has none, and the names of the classes.

    These are the given ones; without, they are in the order that the column declares, or else in their own.
    """
    check_column(dataset, name, column, WITHOUT_LABELS)
    values, feature = dataset.with_format("arrow")[column][:], dataset.features[column]
    if pyarrow.types.is_nested(values.type):
        raise ValueError(f"column {column!r} of {name} holds {values.type}; labels are numbers or text")
    if isinstance(feature, datasets.ClassLabel):
        names, numbers = feature.names, values
    else:
        there = values.filter(compute.invert(compute.is_null(values, nan_is_null=True)))
        known = there.unique().to_pylist()
        known.sort(key=natural_order if all(isinstance(value, str) for value in known) else None)
        names, numbers = [str(value) for value in known], compute.index_in(values, pyarrow.array(known, values.type))
    labels = torch.tensor(compute.fill_null(numbers, NO_CLASS).to_numpy(), dtype=torch.int64)
    return renumber(labels, names, class_names, name)


def renumber(
    labels: torch.Tensor, names: list[str], class_names: Sequence[str] | None, source: str
) -> tuple[torch.Tensor, list[str]]:
    """Labels (N,) into `names` as labels into the class names, if there are any, and the names that hold.

    A ValueError names the classes that occur and are not among them.
    """
    if class_names is None or list(class_names) == names:  # of these, two may be the same word, as ImageNet's "crane"
        return labels, names
    number = {name: number for number, name in enumerate(class_names)}
    occurring = [names[label] for label in labels.unique().tolist() if label != NO_CLASS]
    if unknown := [name for name in occurring if name not in number]:
        raise ValueError(
            f"{source} has images of {len(unknown)} classes, {_some(unknown)}, that are not among the "
            f"{len(number)} expected: {_some(list(number))}"
        )
    renumbered = torch.tensor([number.get(name, NO_CLASS) for name in names] + [NO_CLASS])
    return renumbered[labels], list(class_names)  # NO_CLASS finds itself at the end


def captions(dataset: datasets.Dataset, name: str, column: str) -> Sequence[str]:
    """The text of each row, read when it is asked for; of several, as COCO has five, the first.

    The first and not a drawn one, so that everything that reads a row speaks of the same caption.
    """
    check_column(dataset, name, column)
    values = dataset.with_format("arrow")[column][:]
    several = pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type)
    missing = compute.is_null(values)
    if several:
        missing = compute.fill_null(compute.equal(compute.list_value_length(values), 0), True)
        values = compute.list_element(compute.if_else(missing, pyarrow.scalar(None, values.type), values), 0)
        missing = compute.is_null(values)
    if compute.any(missing).as_py():
        first = compute.index(missing, True).as_py()
        raise ValueError(f"{compute.sum(missing)} rows of {name} have no {column!r}; the first is row {first}")
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise ValueError(f"column {column!r} of {name} holds {values.type}; captions are text, or lists of it")
    return datasets.Dataset(pyarrow.table({column: values}))[column] if several else dataset[column]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
