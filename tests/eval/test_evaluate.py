import json

import PIL.Image
import pytest
import torch

from eval import inception
from eval.classifier import ClassifierFeatures
from eval.evaluate import Reference, generate
from eval.monitor import SampleMonitor, reference_for
from eval.speed import measure_speed
from eval.tuning import REPORT_SEED, TUNING_SEED, Grid, tune_and_measure
from students import OneStepPipeline, TokenInitialiser
from teachers.conditions.condition import ClassLabels
from teachers.data import DataConfig, load_data


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train, test = load_data(DataConfig()), load_data(DataConfig(split="test"))
    return ClassifierFeatures.cached(folder, DataConfig(), train, test), folder


def test_the_classifier_knows_digits_and_is_kept(features):
    trained, folder = features
    assert trained.test_accuracy > 0.97
    weights = folder / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    again = ClassifierFeatures.cached(folder, DataConfig(split="test"), None, None)
    assert weights.stat().st_mtime_ns == written
    images = load_data(DataConfig(split="test")).images()
    assert torch.equal(again(images), trained(images))


def test_real_images_measure_well_and_noise_does_not(features):
    data = load_data(DataConfig(split="all"))
    reference = Reference(features[0], data.images())
    real = reference.measure(data.images(), data.labels)
    noise = reference.measure(torch.rand(1797, 1, 8, 8), data.labels)
    assert real["fd"] < 1e-6
    assert real["class_consistency"] > 0.97
    assert real["precision"] == real["recall"] == real["coverage"] == 1
    assert noise["fd"] > 10 * reference.split_half_distance()
    assert noise["class_consistency"] < 0.3
    assert noise["kd"] > 10 * abs(real["kd"])


def test_generated_images_do_not_depend_on_the_batch_size(teacher):
    images, labels, nfe = generate(teacher, 23, batch_size=23)
    parts, _, _ = generate(teacher, 23, batch_size=5)
    other, _, _ = generate(teacher, 23, seed=1)
    assert torch.equal(images, parts)
    assert not torch.equal(images, other)
    assert labels.tolist() == [place % 10 for place in range(23)]
    assert nfe == 4


class Fake:
    """Features of which temperature 0.5 is nearest to the real ones."""

    name = "fake"
    distance_names = ("fd", "kd")

    def __call__(self, images):
        return images

    def judge(self, features, rows):
        return {}


def test_tuning_reports_on_another_draw(monkeypatch):
    seeds = []

    def fake_generate(pipeline, num_images, *, conditions, seed, description, temperature):
        seeds.append((temperature, seed, num_images))
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_images, 2, generator=generator) + abs(temperature - 0.5), None, 1

    monkeypatch.setattr("eval.tuning.generate", fake_generate)
    grid = Grid((1.0, 0.5, 0.2), (1.0,), (1,), num_tuning_images=500, num_report_images=800)
    reference = Reference(Fake(), torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)))
    row = tune_and_measure(None, grid.student_settings(), reference, grid, "fake")
    assert row["settings"] == {"temperature": 0.5}
    assert seeds == [(t, TUNING_SEED, 500) for t in (1.0, 0.5, 0.2)] + [(0.5, REPORT_SEED, 800)]
    assert [tried["temperature"] for tried in row["tuning"]] == [1.0, 0.5, 0.2]
    assert "class_consistency" not in row


@pytest.mark.parametrize(("least", "chosen"), [(0.0, 0.5), (0.3, 1.0), (0.9, 0.5)])
def test_tuning_can_ask_for_faithfulness_to_the_class(monkeypatch, least, chosen):
    """Temperature 0.5 has the lowest distance, 1.0 the next, and half of its samples are of their class."""

    class Half(Fake):
        def judge(self, features, rows):
            return {"class_consistency": 0.5 if features[:, 0].mean() > 0.3 else 0.0}

    def fake_generate(pipeline, num_images, *, conditions, seed, description, temperature):
        images = torch.randn(num_images, 2, generator=torch.Generator().manual_seed(seed)) + abs(temperature - 0.5)
        return images, torch.zeros(num_images, dtype=torch.long), 1

    monkeypatch.setattr("eval.tuning.generate", fake_generate)
    grid = Grid((2.0, 1.0, 0.5), (1.0,), (1,), num_tuning_images=500, num_report_images=500)
    reference = Reference(Half(), torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)))
    row = tune_and_measure(None, grid.student_settings(), reference, grid, "fake", {"class_consistency": least})
    assert row["settings"] == {"temperature": chosen}


def test_the_monitor_writes_samples(teacher, tmp_path):
    measures = SampleMonitor(tmp_path / "run", DataConfig(name=""))(teacher, ClassLabels(torch.arange(10)), 7)
    assert measures == {}
    assert (tmp_path / "run" / "samples" / "step-000007.png").stat().st_size > 0


def test_speed_rows(teacher):
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    candidates = {"student": (student, {}), "teacher": (teacher, {"num_inference_steps": 3, "guidance_scale": 2.0})}
    rows = measure_speed(candidates, batch_sizes=[1, 4], num_repeats=2)
    assert [(row["name"], row["batch_size"], row["nfe"]) for row in rows] == [
        ("student", 1, 1),
        ("teacher", 1, 6),
        ("student", 4, 1),
        ("teacher", 4, 6),
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds_median"])
        assert 0 < row["seconds_median"] <= row["seconds_p95"]
    json.dumps(rows)


def test_missing_inception_weights_are_one_clear_message(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=inception.WEIGHTS):
        inception.find_weights(tmp_path / "nowhere.pt")

    def offline(folder):
        (tmp_path / inception.WEIGHTS).write_bytes(b"a part")
        raise OSError("no route to host")

    monkeypatch.setattr(inception, "CACHE", tmp_path)
    monkeypatch.setattr(inception, "check_download_inception", offline)
    with pytest.raises(FileNotFoundError, match="--inception-path"):
        inception.find_weights(None)
    assert not (tmp_path / inception.WEIGHTS).exists()


def test_own_data_needs_no_test_split(tmp_path):
    """A folder of images alone: a tenth of them is held out for the classifier's accuracy."""
    for name, shade in [("dark", 30), ("light", 220)]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            PIL.Image.new("L", (8, 8), shade + i).save(tmp_path / "images" / name / f"{i}.png")
    reference = reference_for(DataConfig(name=str(tmp_path / "images")), tmp_path / "classifier")
    assert len(reference.real_features) == 40
    assert reference.features.test_accuracy == 1
