"""What a training run measures of itself: as the pipeline makes its images, and of few images what there is."""

import logging
from types import SimpleNamespace

import PIL.Image
import pytest
import torch

from eval import monitor
from eval.monitor import ReconstructionMonitor, SampleMonitor
from teachers.conditions.condition import ClassLabels
from teachers.data import DataConfig, load_data


@pytest.fixture
def pictures(tmp_path):
    """Folders of so many images in colour, of two classes and two sizes."""

    def pictures(num_images):
        folder = tmp_path / f"images-{num_images}"
        for number in range(num_images):
            name, side = ("dark", 9) if number % 2 else ("light", 12)
            (folder / name).mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (side, 9), (200 * (number % 2), number, 0)).save(folder / name / f"{number}.png")
        return str(folder)

    return pictures


class Pixels:
    name, distance_names = "pixels", ("fd", "kd")

    def __call__(self, images):
        return images.flatten(1)

    def judge(self, features, rows):
        return {}


@pytest.fixture
def asked(monkeypatch):
    """The settings that features were asked for, which are pixels."""
    asked = []
    monkeypatch.setattr(monitor, "make_features", lambda config, *given, **more: asked.append(config) or Pixels())
    monkeypatch.setattr(monitor, "NUM_IMAGES", 30)
    return asked


def two_classes(teacher):
    teacher.denoiser.register_to_config(num_classes=2)
    return teacher


def test_real_images_are_read_at_the_pipelines_size(teacher, pictures, asked, tmp_path):
    watch = SampleMonitor(tmp_path / "run", DataConfig(name=pictures(20)))
    assert watch(two_classes(teacher), ClassLabels(torch.arange(2)), 0).keys() == {"fd"}
    assert (asked[0].image_size, asked[0].num_channels) == (8, 1)


def test_settings_that_contradict_are_refused_before_an_image_is_made(teacher, pictures, asked, tmp_path):
    for settings in ({"image_size": 9}, {"num_channels": 3}):
        watch = SampleMonitor(tmp_path / "run", DataConfig(name=pictures(20), **settings))
        with pytest.raises(ValueError, match="where images of 8x8 in grey are wanted"):
            watch(two_classes(teacher), ClassLabels(torch.arange(2)), 0)
    assert not (tmp_path / "run").exists()


def test_with_few_images_samples_are_shown_and_nothing_is_measured(teacher, pictures, tmp_path, caplog):
    watch = SampleMonitor(tmp_path / "run", DataConfig(name=pictures(5)))
    with caplog.at_level(logging.WARNING):
        measures = [watch(two_classes(teacher), ClassLabels(torch.arange(2)), step) for step in (0, 1)]
    assert measures == [{}, {}]
    assert sum("at least 10" in record.getMessage() for record in caplog.records) == 1
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_processes_may_be_more_than_real_images(pictures, monkeypatch):
    data = load_data(DataConfig(name=pictures(10), image_size=8))
    shares = []
    monkeypatch.setattr(monitor, "gather_rows", lambda rows: shares.append(rows) or torch.rand(10, 64))
    for process in range(12):
        state = SimpleNamespace(process_index=process, num_processes=12)
        monkeypatch.setattr(monitor, "PartialState", lambda state=state: state)
        monitor._shared_reference(Pixels(), data, "images")
    assert [len(share) for share in shares] == [1] * 10 + [0] * 2
    assert torch.equal(torch.cat(shares), data.images().flatten(1))


@pytest.mark.parametrize(("num_images", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (30, 3, 10), (45, 4, 10)])
def test_a_tokenizer_of_few_images_has_a_picture(teacher, pictures, tmp_path, num_images, rows, columns):
    data = DataConfig(name=pictures(num_images), label_column="", image_size=8)
    measures = ReconstructionMonitor(tmp_path / "run", data)(teacher.tokenizer, 7)
    assert measures.keys() == {"mean_squared_error", "codebook_used", "perplexity"}
    with PIL.Image.open(tmp_path / "run" / "samples" / "step-000007.png") as picture:
        assert picture.size == (columns * 34, 2 * rows * 34)


def test_a_tokenizer_of_few_labelled_images_is_measured_without_a_classifier(teacher, pictures, tmp_path, asked):
    """Of nine images no tenth can be held out; of ten one can."""
    for num_images, kept in [(9, False), (10, True)]:
        data = DataConfig(name=pictures(num_images), image_size=8)
        measures = ReconstructionMonitor(tmp_path / str(num_images), data)(teacher.tokenizer, 0)
        assert ("reconstruction_fd" in measures) == kept == bool(asked)
