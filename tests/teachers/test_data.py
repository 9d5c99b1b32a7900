import os
from dataclasses import replace

import datasets
import PIL.Image
import pytest
import torch

from teachers.data import DataConfig, load_data


def test_digits_are_split_without_overlap():
    train, test, everything = (load_data(DataConfig(split=split)) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1500, 297, 1797)
    assert torch.equal(torch.cat([train.images(), test.images()]), everything.images())
    assert set(test.labels.tolist()) == set(range(10))
    assert train.images().shape == (1500, 1, 8, 8)
    assert (train.images().min(), train.images().max()) == (0, 1)


@pytest.fixture
def colours():
    """Six 12x8 images of one colour each, with labels and captions."""
    images = [PIL.Image.new("RGB", (12, 8), (40 * i, 255 - 40 * i, 7)) for i in range(6)]
    return datasets.Dataset.from_dict(
        {"picture": images, "kind": ["cat", "dog"] * 3, "caption": [f"number {i}" for i in range(6)]},
        features=datasets.Features(
            picture=datasets.Image(), kind=datasets.Value("string"), caption=datasets.Value("string")
        ),
    )


COLUMNS = {"image_column": "picture", "label_column": "kind", "text_column": "caption"}


def test_parquet_with_other_column_names(colours, tmp_path):
    path = tmp_path / "train-00000.parquet"
    colours.to_parquet(path)
    for name in (str(path), str(tmp_path)):
        data = load_data(DataConfig(name=name, image_size=4, num_channels=3, **COLUMNS))
        assert data.class_names == ["cat", "dog"]
        assert data.labels.tolist() == [0, 1] * 3
        assert data.texts[5] == "number 5"
        image, label = data[5]
        assert label == 1
        torch.testing.assert_close(image, torch.tensor([200, 55, 7]).view(3, 1, 1).expand(3, 4, 4) / 255)


def test_saved_datasets(colours, tmp_path):
    colours.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=colours, test=colours.select(range(2))).save_to_disk(tmp_path / "splits")
    assert len(load_data(DataConfig(name=str(tmp_path / "one"), num_channels=3, **COLUMNS))) == 6
    assert len(load_data(DataConfig(name=str(tmp_path / "splits"), split="test", num_channels=3, **COLUMNS))) == 2
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_data(DataConfig(name=str(tmp_path / "splits"), split="validation", **COLUMNS))


def test_a_missing_column_is_named_with_those_there_are(colours, tmp_path):
    path = tmp_path / "train.parquet"
    colours.to_parquet(path)
    with pytest.raises(ValueError, match="no column 'image'; it has picture, kind, caption"):
        load_data(DataConfig(name=str(path)))


def test_a_missing_split_file_and_place(colours, tmp_path):
    colours.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(FileNotFoundError, match="no parquet file"):
        load_data(DataConfig(name=str(tmp_path / "other.parquet")))
    with pytest.raises(ValueError, match="split 'validation'"):
        load_data(DataConfig(name=str(tmp_path), split="validation"))
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_data(DataConfig(split="validation"))


def test_a_dataset_that_is_nowhere(monkeypatch):
    def offline(name, split):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="'no/where' is neither"):
        load_data(DataConfig(name="no/where"))


def test_an_image_folder(tmp_path):
    for name, shade in [("dark", 30), ("light", 220)]:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            PIL.Image.new("L", (5, 5), shade).save(tmp_path / "train" / name / f"{i}.png")
    data = load_data(DataConfig(name=str(tmp_path)))
    assert data.class_names == ["dark", "light"]
    shades = data.images().mean((1, 2, 3))
    torch.testing.assert_close(shades, torch.where(data.labels == 0, 30 / 255, 220 / 255))


def test_holding_out(colours, tmp_path):
    colours.to_parquet(tmp_path / "train.parquet")
    data = load_data(DataConfig(name=str(tmp_path), image_size=4, num_channels=3, **COLUMNS))
    kept, held_out = data.hold_out(1 / 3)
    assert (len(kept), len(held_out)) == (4, 2)
    assert sorted(kept.texts + held_out.texts) == data.texts
    for part in (kept, held_out):
        for (image, label), text in zip(part, part.texts, strict=True):
            expected, expected_label = data[int(text.removeprefix("number "))]
            assert torch.equal(image, expected)
            assert label == expected_label


@pytest.mark.parametrize(("num_images", "share", "expected"), [(5, 0.1, 1), (2, 0.9, 1), (6, 0.5, 3)])
def test_something_is_held_out_and_something_kept(colours, tmp_path, num_images, share, expected):
    colours.select(range(num_images)).to_parquet(tmp_path / "train.parquet")
    data = load_data(DataConfig(name=str(tmp_path), num_channels=3, **COLUMNS))
    kept, held_out = data.hold_out(share)
    assert (len(kept), len(held_out)) == (num_images - expected, expected)
    with pytest.raises(ValueError, match="at least 2"):
        data.subset([0]).hold_out(share)


def images_in(folder, *images, **columns):
    """A configuration of a parquet file of these images, None where there is none."""
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    rows = datasets.Dataset.from_dict({"image": list(images), **columns}, features=datasets.Features(features))
    rows.to_parquet(folder / "train.parquet")
    return DataConfig(name=str(folder), label_column="label" if columns else "")


GREY, WIDE = PIL.Image.new("L", (4, 4), 9), PIL.Image.new("L", (6, 5), 9)


def test_images_of_several_sizes_are_named_with_the_setting_that_makes_them_one(tmp_path):
    config = images_in(tmp_path, GREY, GREY, GREY, WIDE)
    data = load_data(config)
    for read in (lambda: data.images(), lambda: data[3], lambda: data.subset([3]).images()):
        with pytest.raises(ValueError, match=r"image 3 is of 6x5 pixels, and image 0 of 4x4.*data\.image_size"):
            read()
    assert load_data(replace(config, image_size=4)).images().shape == (4, 1, 4, 4)


def test_a_row_without_an_image_is_named(tmp_path):
    data = load_data(images_in(tmp_path, GREY, GREY, None, GREY))
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=r"^image 2 cannot be read: .*none$"):
            list(data.batches(num_workers=num_workers))
    with pytest.raises(ValueError, match="image 2 cannot be read"):
        data.subset([3, 1, 2]).__getitems__([0, 2])


def test_an_image_of_a_folder_is_named_by_its_file(tmp_path):
    GREY.save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"image 1 cannot be read: .*1\.png"):
        load_data(DataConfig(name=str(tmp_path), label_column="")).images()


def test_images_without_a_label_are_refused_or_left_out(tmp_path):
    shades = [PIL.Image.new("L", (4, 4), shade) for shade in range(4)]
    config = images_in(tmp_path, *shades, label=[None, "b", None, "a"], text=["k", "l", "m", "n"])
    with pytest.raises(ValueError, match=r"2 of 4 rows .* the first is row 0; data\.drop_unlabelled=true"):
        load_data(config)
    data = load_data(replace(config, drop_unlabelled=True, text_column="text"))
    assert (data.labels.tolist(), data.class_names, data.texts) == ([1, 0], ["a", "b"], ["l", "n"])
    assert (255 * data.images()[:, 0, 0, 0]).tolist() == [1, 3]
    assert data.subset([1]).texts == ["n"]
    with pytest.raises(ValueError, match="no images"):
        load_data(replace(images_in(tmp_path, GREY, label=[None]), drop_unlabelled=True))


def test_a_split_that_lacks_a_class_has_the_numbers_of_the_training(tmp_path):
    for split, label in [("train", ["cat", "dog", "owl"]), ("test", ["owl", "dog", "owl"])]:
        images_in(tmp_path, GREY, GREY, GREY, label=label)
        (tmp_path / "train.parquet").rename(tmp_path / f"{split}-00000.parquet")
    trained = load_data(DataConfig(name=str(tmp_path)))
    config = DataConfig(name=str(tmp_path), split="test")
    assert load_data(config).labels.tolist() == [1, 0, 1]
    data = load_data(config, trained.class_names)
    assert (data.labels.tolist(), data.class_names) == ([2, 1, 2], ["cat", "dog", "owl"])
    with pytest.raises(ValueError, match="owl, that are not among"):
        load_data(config, ["cat", "dog"])
    assert (
        load_data(DataConfig(), [*"9876543210"]).labels[:50].tolist()
        == (9 - load_data(DataConfig()).labels[:50]).tolist()
    )


def test_a_column_that_holds_no_images_is_named(tmp_path):
    datasets.Dataset.from_dict({"number": [3]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"'number' .* does not hold images"):
        load_data(DataConfig(name=str(tmp_path), image_column="number", label_column=""))


def test_a_fingerprint_is_of_what_is_learnt_from(tmp_path):
    def fingerprint(*images, class_names=None, label=("a", "b")):
        config = images_in(tmp_path, *images, label=list(label))
        return load_data(config, class_names).fingerprint

    first = fingerprint(GREY, GREY)
    assert load_data(DataConfig(name=str(tmp_path))).fingerprint == first
    others = [
        fingerprint(GREY, GREY, class_names=["b", "a"]),
        fingerprint(GREY, WIDE),
        fingerprint(GREY, GREY, label="ba"),
    ]
    digits = load_data(DataConfig())
    others += [
        part.fingerprint for part in (digits, digits.subset([1, 2]), digits.subset([2, 1]), *digits.hold_out(0.5))
    ]
    others += [load_data(DataConfig(split="test")).fingerprint, load_data(DataConfig(label_column="")).fingerprint]
    assert len({first, *others}) == 1 + len(others)
    assert load_data(DataConfig()).hold_out(0.5)[0].fingerprint == digits.hold_out(0.5)[0].fingerprint


@pytest.mark.parametrize(
    ("folder", "settings", "shape", "num_rows", "num_classes"),
    [
        ("mnist", {"num_channels": 1}, (1, 28, 28), 10000, 10),
        ("cifar10", {"num_channels": 3, "image_size": 16}, (3, 16, 16), 10000, 10),
        ("emoji", {"num_channels": 3, "label_column": "", "text_column": "text"}, (3, 64, 64), 354, 0),
    ],
)
def test_real_parquet_files(shared, folder, settings, shape, num_rows, num_classes):
    data = load_data(DataConfig(name=str(shared / "data" / folder), split="test", **settings))
    assert (len(data), data.num_classes) == (num_rows, num_classes)
    image, label = data[17]
    assert image.shape == shape
    assert 0 <= image.min() < image.max() <= 1
    assert label == (-1 if num_classes == 0 else data.labels[17])
    assert data.texts is None or all(isinstance(text, str) for text in data.texts)


@pytest.mark.parametrize("split", ["train", "train[1:]", "train+test"])
@pytest.mark.parametrize("kind", ["parquet file", "parquet folder", "image folder", "captioned folder", "saved"])
def test_a_fingerprint_knows_nothing_of_what_datasets_keeps(kind, split, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        if "parquet" in kind:
            images_in(folder, GREY, GREY, text="ab")
            (folder / "train.parquet").rename(folder / f"{part}-00000.parquet")
        else:
            for number in range(2):
                GREY.save(folder / part / f"{number}.png")
        if kind == "captioned folder":
            (folder / part / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    if kind == "saved":
        rows = datasets.Dataset.from_dict({"image": [GREY, GREY]}).cast_column("image", datasets.Image())
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(folder)
    path = folder / "train-00000.parquet" if kind == "parquet file" else folder
    found = set()
    for cache in ("one", "one", "other"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
        found.add(load_data(DataConfig(name=str(path), split=split, label_column="")).fingerprint)
    assert len(found) == 1
    assert (tmp_path / "other").exists() == ("parquet" in kind or kind == "captioned folder")


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    GREY.save(tmp_path / "0.png")
    (tmp_path / f"{name}.png").write_bytes((tmp_path / "0.png").read_bytes())
    images_in(tmp_path, GREY)
    (tmp_path / "train.parquet").rename(tmp_path / f"{name}.parquet")
    for path in (tmp_path, tmp_path / f"{name}.parquet"):
        with pytest.raises(ValueError, match=r"caf\\udce9\.p.* is not UTF-8"):
            load_data(DataConfig(name=str(path), split=name if path == tmp_path else "train", label_column=""))
    (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(ValueError, match=r"caf\\udce9\.png' is not UTF-8"):
        load_data(DataConfig(name=str(tmp_path), label_column=""))
