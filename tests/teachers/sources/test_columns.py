import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from teachers.sources.columns import NO_CLASS, captions, class_labels, natural_order


def column(values, feature=None):
    return Dataset.from_dict({"it": values}, features=Features(it=feature) if feature else None)


def labels(values, feature=None, class_names=None):
    found, names = class_labels(column(values, feature), "data", "it", class_names)
    assert found.dtype == torch.int64
    return found.tolist(), names


def test_numbers_in_names_are_numbers():
    names = ["10", "9", "cat", "cat 10", "cat 9", "1", "01", ""]
    assert sorted(names, key=natural_order) == ["", "01", "1", "9", "10", "cat", "cat 9", "cat 10"]


@pytest.mark.parametrize(
    ("values", "expected", "names"),
    [
        (["10", "2", "10"], [1, 0, 1], ["2", "10"]),
        ([10, 2, -1], [2, 1, 0], ["-1", "2", "10"]),
        (["b", None, "a"], [1, NO_CLASS, 0], ["a", "b"]),
        ([3.0, float("nan"), None, 1.5], [1, NO_CLASS, NO_CLASS, 0], ["1.5", "3.0"]),
        ([True, False], [1, 0], ["False", "True"]),
        ([None, None], [NO_CLASS, NO_CLASS], []),
    ],
)
def test_labels_of_every_kind(values, expected, names):
    assert labels(values) == (expected, names)


def test_declared_classes_keep_their_order_and_may_lack_a_label():
    feature = ClassLabel(names=["10", "9", "owl"])
    assert labels([2, -1, 0, None], feature) == ([2, NO_CLASS, 0, NO_CLASS], ["10", "9", "owl"])


def test_labels_of_a_selection_are_its_own():
    rows = column(["a", None, "b", "c"]).select([3, 0])
    assert class_labels(rows, "data", "it")[0].tolist() == [1, 0]


def test_the_numbers_of_given_names():
    given = ["owl", "cat", "dog"]
    assert labels(["dog", None, "cat"], class_names=given) == ([2, NO_CLASS, 1], given)
    assert labels([1, 0, -1], ClassLabel(names=["cat", "owl", "never seen"]), given) == ([0, 1, NO_CLASS], given)
    assert labels([7, 3], class_names=["3", "5", "7"]) == ([2, 0], ["3", "5", "7"])
    with pytest.raises(ValueError, match="1 classes, eel, that are not among the 3"):
        labels(["cat", "eel"], class_names=given)


def test_lists_are_no_labels():
    with pytest.raises(ValueError, match="labels are numbers or text"):
        labels([[1, 2], [3]])


def test_the_first_of_several_captions():
    several = column([["a", "b"], ["c"], ["d", None]])
    assert captions(several, "data", "it")[:] == ["a", "c", "d"]
    assert captions(several.select([2, 0]), "data", "it")[[0, 1]] == ["d", "a"]
    assert captions(column(["a", "b"]), "data", "it")[:] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (["a", None, "b", None], None),
        ([["a"], [], ["b"], None], None),
        ([["a"], [None, "c"], ["b"], []], List(Value("string"))),
    ],
)
def test_rows_without_a_caption_are_counted_and_named(values, feature):
    with pytest.raises(ValueError, match=r"2 rows of data have no 'it'; the first is row 1$"):
        captions(column(values, feature), "data", "it")


@pytest.mark.parametrize("values", [[1, 2], [[1], [2]], [{"raw": "a"}]])
def test_captions_are_text(values):
    with pytest.raises(ValueError, match="captions are text"):
        captions(column(values), "data", "it")


def test_labels_of_many_rows_are_not_numbered_one_by_one(monkeypatch):
    """No value of a column becomes a Python object but the names of its classes."""
    rows = datasets.Dataset.from_dict({"it": [f"class {number % 1000}" for number in range(100_000)]})
    monkeypatch.setattr(datasets.arrow_dataset.Column, "__iter__", lambda self: pytest.fail("read one by one"))
    found, names = class_labels(rows, "data", "it")
    assert (len(names), names[999]) == (1000, "class 999")
    assert torch.equal(found, torch.arange(100_000) % 1000)


def test_a_missing_column_is_named_with_those_there_are():
    for read in (captions, class_labels):
        with pytest.raises(ValueError, match="data has no column 'that'; it has it"):
            read(column(["a"]), "data", "that")
