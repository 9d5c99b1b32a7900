"""Real images beside those of a pipeline: the same size, colours and classes, and known again when they change."""

from dataclasses import replace

import datasets
import PIL.Image
import pytest
import torch
from drawn import redraw

from eval.classifier import ClassifierFeatures, train_classifier
from eval.evaluate import identify
from eval.real import data_like, image_shape, like, make_features, obstacle, settings_like
from teachers import MaskedDiffusionPipeline, MaskGITSampler, MaskGITTransformer, PatchTokenizer
from teachers.data import DataConfig, load_data


def in_colour(num_classes=2, class_names=None):
    """A teacher of 16x16 images in colour."""
    tokenizer = PatchTokenizer.fit(torch.rand(4, 3, 16, 16), patch_size=4, codebook_size=16)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "mlp_size": 32}
    denoiser = redraw(MaskGITTransformer(16, num_classes, (4, 4), **sizes), 0.1).eval()
    return MaskedDiffusionPipeline(denoiser, tokenizer, MaskGITSampler(), class_names=class_names)


@pytest.fixture
def colour_teacher():
    return in_colour()


@pytest.fixture
def folder(tmp_path):
    """Images in colour of two classes and many sizes."""
    for name, colour in [("dark", (30, 0, 60)), ("light", (220, 250, 200))]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            shape = (16 + number, 20 - number)
            PIL.Image.new("RGB", shape, colour).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_settings_that_are_not_given_follow_the_pipeline(teacher, colour_teacher, folder):
    for pipeline, shape in [(teacher, (1, 8, 8)), (colour_teacher, (3, 16, 16))]:
        config = settings_like(pipeline, [f"name={folder}", "label_column="])
        assert config == like(pipeline, replace(config, image_size=0, num_channels=1))
        images = data_like(pipeline, config).images()
        assert images.shape == (20, *shape) == (20, *image_shape(pipeline.tokenizer))


def test_digits_are_all_unless_a_split_is_named(teacher):
    for overrides, num_images in [([], 1797), (["split=train"], 1500), (["split=test"], 297), (["split=all"], 1797)]:
        assert len(data_like(teacher, settings_like(teacher, overrides))) == num_images
    for split, num_images in [("train", 1797), ("test", 297), ("all", 1797)]:  # the first is the default
        assert len(data_like(teacher, like(teacher, DataConfig(split=split)))) == num_images


def test_images_that_are_made_others_to_compare_with_are_said(teacher, folder, tmp_path, caplog):
    """As they are, no word; with smaller ones there is nothing to compare with, unless that is meant."""
    for name, mode, shape in [("same", "L", (8, 8)), ("large", "RGB", (20, 30)), ("small", "L", (8, 6))]:
        (tmp_path / name).mkdir()
        for number in range(3):
            PIL.Image.new(mode, shape).save(tmp_path / name / f"{number}.png")
    about = {name: settings_like(teacher, [f"name={tmp_path / name}", "label_column="]) for name in ("same", "large")}
    data_like(teacher, about["same"])
    data_like(teacher, DataConfig())
    assert not caplog.records
    data_like(teacher, about["large"], may_enlarge=False)
    (record,) = caplog.records
    assert record.args[1:] == ("30x20 in colour", "8x8 in grey")
    small = settings_like(teacher, [f"name={tmp_path / 'small'}", "label_column="])
    assert len(data_like(teacher, small)) == 3
    with pytest.raises(ValueError, match=r"6x8 in grey .* image_size=8"):
        data_like(teacher, small, may_enlarge=False)

    rows = [{"image": PIL.Image.new("L", (8, 8)), "label": 0}, {"image": None, "label": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "unlabelled.parquet")
    config = settings_like(teacher, [f"name={tmp_path / 'unlabelled.parquet'}", "drop_unlabelled=true"])
    assert len(data_like(teacher, config)) == 1  # what is left out is not looked at


def test_settings_that_contradict_the_pipeline_are_refused(teacher, colour_teacher, folder):
    for pipeline, setting, message in [
        (teacher, "image_size=12", "read as 12x12 in grey, where images of 8x8 in grey"),
        (teacher, "num_channels=3", "read as 8x8 in colour, where images of 8x8 in grey"),
        (colour_teacher, "num_channels=1", "read as 16x16 in grey, where images of 16x16 in colour"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_like(pipeline, settings_like(pipeline, [f"name={folder}", setting]))
    with pytest.raises(ValueError, match="read as 12x12"):
        data_like(teacher, like(teacher, DataConfig(name=str(folder), image_size=12)))
    with pytest.raises(ValueError, match="read as 8x8 in grey, where images of 16x16 in colour"):
        data_like(colour_teacher, DataConfig())


def test_another_number_of_classes_without_names_is_refused(teacher, colour_teacher, folder):
    config = settings_like(teacher, [f"name={folder}"])
    with pytest.raises(ValueError, match="has 2 classes and the pipeline 10"):
        data_like(teacher, config)
    assert len(data_like(teacher, replace(config, label_column=""))) == 20


def test_labels_are_numbered_as_the_pipelines_classes_are(folder):
    """Also where a class has no image, so that the labels of the others would move up."""
    names = ["blue", "dark", "light"]
    teacher = in_colour(3, names)
    config = settings_like(teacher, [f"name={folder}"])
    data = data_like(teacher, config)
    assert (data.labels.unique().tolist(), data.class_names) == ([1, 2], names)
    with pytest.raises(ValueError, match="light"):
        data_like(in_colour(3, ["dark", "cat", "dog"]), config)


def test_what_the_settings_come_to_tells_classifiers_apart(tmp_path, monkeypatch):
    """8x8 digits are the same images with image_size=8; images of another size or under other names are not."""
    trained = []
    monkeypatch.setattr(
        "eval.classifier.train_classifier",
        lambda train, test, device: trained.append(train) or train_classifier(train, test, device, num_steps=1),
    )
    data = load_data(DataConfig(split="test"))
    for config in (DataConfig(), DataConfig(image_size=8), DataConfig(split="test")):
        ClassifierFeatures.cached(tmp_path, config, data, data)
    assert len(trained) == 1
    renamed = load_data(DataConfig(split="test"))
    renamed.class_names = [*reversed(data.class_names)]
    ClassifierFeatures.cached(tmp_path, DataConfig(), renamed, renamed)
    assert len(trained) == 2


def test_what_no_classifier_can_be_trained_on_is_said(folder, tmp_path):
    data = load_data(DataConfig(name=str(folder), image_size=8))
    assert obstacle(data, to_classifier=True) is None
    for part, kept in [(data.subset(range(9)), False), (data.subset(range(10)), True), (data.subset(range(11)), True)]:
        assert (obstacle(part, to_classifier=False) is None) == kept
    assert obstacle(data.subset(range(10)), to_classifier=True) is not None  # of one class alone
    with pytest.raises(ValueError, match=r"no classifier .* --features inception"):
        make_features(DataConfig(name=str(folder), label_column="", image_size=8), tmp_path / "classifier")


def write(kind, path, shade):
    """Pictures of two classes in a data set of this kind."""
    pictures = [PIL.Image.new("L", (8, 8), value) for value in (shade, 220)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}).cast_column("image", datasets.Image())
    if kind == "image folder":
        for name, picture in zip(("dark", "light"), pictures, strict=True):
            (path / name).mkdir(parents=True, exist_ok=True)
            picture.save(path / name / "0.png", compress_level=0)
    elif kind == "parquet file":
        rows.to_parquet(path)
    elif kind == "folder of parquet":
        path.mkdir(exist_ok=True)
        rows.to_parquet(path / "train.parquet")
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    else:
        rows.save_to_disk(path)


KINDS = ("image folder", "parquet file", "folder of parquet", "saved", "saved splits")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_replaced_are_other_images(kind, tmp_path):
    """By others of the same size and name."""
    path = tmp_path / ("images.parquet" if kind == "parquet file" else "images")
    write(kind, path, 30)
    sizes = {file: file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()}
    first = identify(load_data(DataConfig(name=str(path))))
    assert first == identify(load_data(DataConfig(name=str(path))))
    write(kind, tmp_path / "other", 31)
    if path.is_file():
        (tmp_path / "other").replace(path)
    else:
        for file in path.rglob("*.arrow" if "saved" in kind else "*"):
            if file.is_file():
                (tmp_path / "other" / file.relative_to(path)).replace(file)
    assert {file: file.stat().st_size for file in sizes} == sizes
    assert identify(load_data(DataConfig(name=str(path)))) != first
