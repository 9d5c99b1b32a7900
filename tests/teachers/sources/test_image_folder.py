import json
import logging
import os

import PIL.Image
import pytest

from teachers.data import DataConfig, load_data
from teachers.sources.dataset import open_dataset


@pytest.fixture
def tree(tmp_path):
    """Makes images of these paths, and says what a split of them holds: paths in order, labels' names."""

    def tree(*paths, root="images"):
        for number, path in enumerate(paths):
            (tmp_path / root / path).parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (2, 2), number).save(tmp_path / root / path)

        def read(split="train"):
            rows = open_dataset(str(tmp_path / root), split)
            found = [image.filename for image in rows["image"]]
            names = [os.path.relpath(path, tmp_path / root) for path in found]
            labels = rows.features["label"].int2str(rows["label"][:]) if "label" in rows.features else None
            return names, labels

        return read

    return tree


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("teachers")]


def test_names_of_files_say_nothing(tree, warned):
    names = ["a_test.png", "b-train.png", "c.png", "eval 1.png", "testing/d.png", "val.png"]
    read = tree(*[f"cats/{name}" for name in names if "/" not in name], *[f"dogs/{name}" for name in names[:3]])
    found, labels = read()
    assert len(found) == 8
    assert labels == ["cats"] * 5 + ["dogs"] * 3
    assert not warned()


def test_a_class_may_be_called_train(tree, warned):
    found, labels = tree("car/0.png", "train/0.png", "train/1.png", "tram/0.png")()
    assert found == ["car/0.png", "train/0.png", "train/1.png", "tram/0.png"]
    assert labels == ["car", "train", "train", "tram"]
    (said,) = warned()
    assert "train is taken for a class" in said


def test_splits_of_images_have_no_labels(tree):
    read = tree("train/0.png", "train/1.png", "test/0.png")
    assert read() == (["train/0.png", "train/1.png"], None)
    assert read("test") == (["test/0.png"], None)
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        read("validation")


def test_splits_of_classes_are_numbered_alike(tree):
    read = tree("Train/cat/0.png", "Train/dog/0.png", "Train/owl/0.png", "val/owl/0.png", "val/dog/0.png")
    assert read() == (["Train/cat/0.png", "Train/dog/0.png", "Train/owl/0.png"], ["cat", "dog", "owl"])
    assert read("validation") == (["val/dog/0.png", "val/owl/0.png"], ["dog", "owl"])


def test_an_unsorted_test_split_takes_no_labels_from_the_others(tree):
    read = tree("train/cat/0.png", "train/dog/0.png", "test/0.png")
    assert read()[1] == ["cat", "dog"]
    assert read("test") == (["test/0.png"], None)


def test_numbers_of_classes_sort_as_numbers(tree, tmp_path):
    tree(*[f"{number}/0.png" for number in range(12)])
    rows = open_dataset(str(tmp_path / "images"), "train")
    assert rows.features["label"].names == [str(number) for number in range(12)]
    shades = {label: image.getpixel((0, 0)) for label, image in zip(rows["label"], rows["image"], strict=True)}
    assert shades == {number: number for number in range(12)}


@pytest.mark.parametrize("paths", [("0.png", "1.png"), ("all/0.png", "all/1.png"), ("train/all/0.png",)])
def test_images_that_are_not_sorted_have_no_labels(tree, paths):
    assert tree(*paths)() == (list(paths), None)


def test_what_is_above_everything_is_no_class(tree):
    read = tree("download/train/cat/0.png", "download/train/dog/0.png", "download/test/cat/0.png")
    assert read()[1] == ["cat", "dog"]
    assert read("test")[1] == ["cat"]


def test_what_is_left_out_is_said(tree, warned, tmp_path):
    read = tree("train/cat/0.png", "train/dog/0.png", "extra/0.png", "extra/1.png", "0.png")
    (tmp_path / "images" / "train" / "cat" / "1.heic").touch()
    (tmp_path / "images" / ".hidden").mkdir()
    PIL.Image.new("L", (2, 2)).save(tmp_path / "images" / ".hidden" / "0.png")
    assert len(read()[0]) == 2
    others, beside = warned()
    assert "1 files" in others
    assert "1.heic" in others
    assert "3 files" in beside


def test_images_beside_classes_are_found_and_said_to_spoil_the_labels(tree, warned):
    found, labels = tree("cat/0.png", "dog/0.png", "stray.png")()
    assert (len(found), labels) == (3, None)
    assert "no labels" in warned()[0]


def test_splits_below_classes_are_refused(tree):
    with pytest.raises(ValueError, match="SPLIT/CLASS"):
        tree("cat/train/0.png", "cat/test/0.png", "dog/train/0.png")()


@pytest.mark.parametrize("root", ["images", "a [2] b*", "größe"])
def test_captions_of_a_metadata_file(tree, tmp_path, warned, root):
    tree("train/0.png", "train/1_test.png", "train/2.png", "test/0.png", root=root)
    rows = [{"file_name": "1_test.png", "text": "one"}, {"file_name": "0.png", "text": "nought"}]
    (tmp_path / root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_dataset(str(tmp_path / root), "train")
    assert found["text"][:] == ["one", "nought"]
    assert [image.getpixel((0, 0)) for image in found["image"]] == [1, 0]
    (said,) = warned()
    assert "1 images that no metadata names" in said


def test_changed_files_have_another_fingerprint(tree, tmp_path):
    def fingerprint():
        return open_dataset(str(tmp_path / "images"), "train")._fingerprint

    tree("cat/0.png", "dog/0.png")
    first = fingerprint()
    assert first == fingerprint()
    PIL.Image.new("L", (2, 2), 77).save(tmp_path / "images" / "cat" / "0.png")
    second = fingerprint()
    (tmp_path / "images" / "dog").rename(tmp_path / "images" / "wolf")
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize("above", ["", "train/"])
def test_folders_of_the_same_names_in_several_are_no_classes(tree, tmp_path, above):
    tree(*[f"{above}{kind}/{size}/0.png" for kind in ("cat", "dog") for size in ("big", "small")])
    with pytest.raises(ValueError, match=r"CLASS/image or SPLIT/CLASS/image"):
        load_data(DataConfig(name=str(tmp_path / "images")))
    assert len(load_data(DataConfig(name=str(tmp_path / "images"), label_column=""))) == 4


def test_classes_may_keep_their_images_in_a_folder_called_images(tree):
    paths = [f"train/{name}/images/0.png" for name in ("n01", "n02")]
    read = tree(*paths, "val/images/0.png", "val/images/1.png")
    assert read() == (paths, ["n01", "n02"])
    assert read("validation") == (["val/images/0.png", "val/images/1.png"], None)


def test_beside_several_splits_nothing_is_a_class(tree, warned):
    read = tree("train/0.png", "test/0.png", "masks/0.png", "masks/1.png")
    assert read() == (["train/0.png"], None)
    assert read("test") == (["test/0.png"], None)
    assert all("2 files that are in no split, as masks/0.png" in said for said in warned())


def test_a_link_to_a_folder_above_is_not_followed(tree, tmp_path):
    read = tree("cat/0.png", "dog/0.png", "pool/owl/0.png")
    (tmp_path / "images" / "latest").symlink_to(".")
    (tmp_path / "images" / "cat" / "up").symlink_to("..")
    (tmp_path / "images" / "pool" / "owl").rename(tmp_path / "owl")
    (tmp_path / "images" / "owl").symlink_to(tmp_path / "owl")
    assert read() == (["cat/0.png", "dog/0.png", "owl/0.png"], ["cat", "dog", "owl"])


def test_metadata_above_the_splits_is_to_be_moved(tree, tmp_path, warned):
    read = tree("train/cat/0.png", "train/dog/0.png", "test/cat/0.png")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,text\ntrain/cat/0.png,a\n")
    assert read()[1] == ["cat", "dog"]
    (said,) = warned()
    assert "as metadata.csv" in said
    assert "move" in said
