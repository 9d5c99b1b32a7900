import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from teachers.data import DataConfig, image_to_tensor, load_data


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


def test_the_centre_square_is_kept():
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:6] = 255
    assert (image_to_tensor(PIL.Image.fromarray(pixels), size=4, num_channels=1) == 1).all()


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
