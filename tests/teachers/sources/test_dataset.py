import datasets
import PIL.Image
import pytest

from teachers.data import DataConfig, load_data
from teachers.sources.dataset import open_dataset


def numbers(name, split="train"):
    return open_dataset(str(name), split)["number"][:]


def rows(first, last):
    return datasets.Dataset.from_dict({"number": list(range(first, last))})


@pytest.fixture
def places(tmp_path):
    """Ten rows of a train split and three of a test split, in all places where there may be such."""
    hub, flat, saved = (tmp_path / name for name in ("hub", "flat", "saved"))
    for folder, pattern in [(hub / "data", "{}-00000-of-00001.parquet"), (flat, "{}.parquet")]:
        folder.mkdir(parents=True)
        rows(0, 10).to_parquet(folder / pattern.format("train"))
        rows(10, 13).to_parquet(folder / pattern.format("test"))
    datasets.DatasetDict(train=rows(0, 10), test=rows(10, 13)).save_to_disk(saved)
    rows(0, 10).save_to_disk(tmp_path / "one")
    return {"hub": hub, "flat": flat, "saved": saved, "one": tmp_path / "one", "file": flat / "train.parquet"}


@pytest.mark.parametrize("place", ["hub", "flat", "saved", "one", "file"])
def test_a_part_of_a_split(places, place):
    name = places[place]
    assert numbers(name) == list(range(10))
    assert numbers(name, "train[:4]") == [0, 1, 2, 3]
    assert numbers(name, "train[-20%:]") == [8, 9]
    assert numbers(name, "train[:1]+train[9:]") == [0, 9]
    with pytest.raises(ValueError, match="Unrecognized instruction"):
        numbers(name, "train[")


@pytest.mark.parametrize("place", ["hub", "flat", "saved"])
def test_several_splits(places, place):
    assert numbers(places[place], "test") == [10, 11, 12]
    assert numbers(places[place], "test[1:]+train[:1]") == [11, 12, 0]
    with pytest.raises(ValueError, match="no split 'validation'; it has"):
        numbers(places[place], "test+validation")


def test_a_part_of_the_digits_and_of_a_folder_of_images(tmp_path):
    whole, part = (load_data(DataConfig(split=split)) for split in ("train", "train[10%:20%]"))
    assert part.labels.tolist() == whole.labels[150:300].tolist()
    for number in range(5):
        PIL.Image.new("L", (2, 2), number).save(tmp_path / f"{number}.png")
    data = load_data(DataConfig(name=str(tmp_path), split="train[3:]", label_column=""))
    assert (255 * data.images()[:, 0, 0, 0]).tolist() == [3, 4]


def test_shards_belong_to_a_split_by_their_whole_name(tmp_path):
    for name, (first, last) in {
        "train": (0, 2), "train_old": (2, 4), "train2": (4, 6), "training-00000-of-00001": (6, 8), "metadata": (8, 9),
    }.items():  # fmt: skip
        rows(first, last).to_parquet(tmp_path / f"{name}.parquet")
    assert numbers(tmp_path) == [0, 1]
    assert numbers(tmp_path, "train_old") == [2, 3]
    for number in range(2):
        rows(10 + number, 11 + number).to_parquet(tmp_path / f"big-{number:05}-of-00002-0a1b2c.parquet")
    assert numbers(tmp_path, "big") == [10, 11]


def test_the_card_of_a_hub_data_set_says_which_files_are_which(tmp_path):
    for name, (first, last) in {"train-00000-of-00001": (0, 2), "part_a": (2, 4), "part_b": (4, 6)}.items():
        rows(first, last).to_parquet(tmp_path / f"{name}.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part_a.parquet\n---\n# A"
    (tmp_path / "README.md").write_text("# Notes\n\n---\nconfigs: none\n")
    assert numbers(tmp_path) == [0, 1]
    (tmp_path / "README.md").write_text(card)
    assert numbers(tmp_path) == [2, 3]
    assert numbers(tmp_path, "train[1:]") == [3]


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    (tmp_path / "data [v1]").mkdir()
    rows(0, 3).to_parquet(tmp_path / "data [v1]" / "train.parquet")
    assert numbers(tmp_path / "data [v1]") == numbers(tmp_path / "data [v1]" / "train.parquet") == [0, 1, 2]


def test_what_holds_nothing_or_is_torn_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no"):
        open_dataset(str(tmp_path / "empty"), "train")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read"):
        open_dataset(str(tmp_path), "train")


def test_a_folder_called_digits(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert len(load_data(DataConfig(name="digits"))) == 1500
    assert not caplog.records
    (tmp_path / "digits").mkdir()
    PIL.Image.new("L", (2, 2)).save("digits/0.png")
    assert len(load_data(DataConfig(name="./digits", label_column=""))) == 1
    assert len(load_data(DataConfig(name="digits"))) == 1500
    assert "./digits" in caplog.text


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train_0", "train_1", "test_0"], {"train": 2, "test": 1}),
        (["train.00000", "train.00001"], {"train": 2}),
        (["train-1", "train-2", "train-3"], {"train": 3}),
        (["train_00000_of_00001", "train-00000-of-00001"], {"train_00000_of_00001": 1, "train": 1}),
        (["train-00001-of-00002"], {"train": 1}),
        (["coco-2017"], {"coco-2017": 1}),
        (["a-2016", "a-2017"], {"a-2016": 1, "a-2017": 1}),
        (["run-1"], {"run-1": 1}),
        (["run-1", "run-3"], {"run-1": 1, "run-3": 1}),
        (["00000", "00001", "00007"], {"train": 3}),
        (["part-00003-9f8e-c000.snappy", "part-00000-9f8e-c000.snappy"], {"train": 2}),
    ],
)
def test_numbered_files_are_shards_where_all_are_there(names, splits, tmp_path):
    for name in names:
        rows(0, 1).to_parquet(tmp_path / f"{name}.parquet")
    assert {split: len(numbers(tmp_path, split)) for split in splits} == splits
    with pytest.raises(ValueError, match=rf"it has {', '.join(sorted(splits))}; .*name=FILE\.parquet"):
        numbers(tmp_path, "validation")
