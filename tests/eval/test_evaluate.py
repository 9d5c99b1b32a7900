import hashlib
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch

from eval import inception
from eval.classifier import ClassifierFeatures, train_classifier
from eval.evaluate import MAX_PIXELS, Reference, batch_size_for, generate, generate_features, identify, spread
from eval.monitor import SampleMonitor
from eval.real import describe, embed, make_features, make_reference
from eval.speed import measure_speed
from eval.tuning import REPORT_SEED, TUNING_SEED, Grid, tune_and_measure
from students import OneStepPipeline, TokenInitialiser
from teachers.conditions.condition import ClassLabels
from teachers.data import DataConfig, ImageData, load_data


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train, test = load_data(DataConfig()), load_data(DataConfig(split="test"))
    return ClassifierFeatures.cached(folder, DataConfig(), train, test), folder


def test_the_classifier_knows_digits_and_is_kept(features):
    trained, folder = features
    assert trained.test_accuracy > 0.97
    (weights,) = folder.glob("*/*.safetensors")
    written = weights.stat().st_mtime_ns
    again = ClassifierFeatures.cached(folder, DataConfig(split="test"), load_data(DataConfig()), None)
    assert weights.stat().st_mtime_ns == written
    images = load_data(DataConfig(split="test")).images()
    assert torch.equal(again(images), trained(images))


def test_real_images_measure_well_and_noise_does_not(features):
    data = load_data(DataConfig(split="all"))
    reference = make_reference(features[0], DataConfig(split="all"))
    real = reference.measure(reference.real_features, data.labels)
    noise = reference.measure(features[0](torch.rand(1797, 1, 8, 8)), data.labels)
    assert real["fd"] < 1e-6
    assert real["class_consistency"] > 0.97
    assert real["precision"] == real["recall"] == real["coverage"] == 1
    assert noise["fd"] > 10 * reference.split_half_distance()
    assert noise["class_consistency"] < 0.3
    assert noise["kd"] > 10 * abs(real["kd"])


def images_of(pipeline, num_images, **settings):
    return torch.cat([batch.images for batch in generate(pipeline, torch.arange(num_images), **settings)])


def test_generated_images_do_not_depend_on_the_batch_size(teacher):
    images = images_of(teacher, 23, batch_size=23)
    assert torch.equal(images, images_of(teacher, 23, batch_size=5))
    assert not torch.equal(images, images_of(teacher, 23, seed=1))
    batches = list(generate(teacher, torch.arange(20, 23)))
    assert torch.equal(batches[0].images, images[20:])
    assert (batches[0].rows.tolist(), batches[0].nfe) == ([0, 1, 2], 4)


class Watch:
    """Features that count the images they have been shown, and those that are still in memory."""

    name, distance_names = "watch", ("fd", "kd")

    def __init__(self):
        self.shown, self.seen, self.most_alive = [], 0, 0

    def __call__(self, images):
        self.shown.append(weakref.ref(images))
        self.seen += len(images)
        self.most_alive = max(self.most_alive, sum(len(kept()) for kept in self.shown if kept() is not None))
        return images.flatten(1).double()

    def judge(self, features, rows):
        return {}


def test_images_generated_or_real_are_kept_no_longer_than_a_batch(teacher):
    watch = Watch()
    features, rows, nfe = generate_features(teacher, watch, 300)
    assert (len(features), watch.seen, watch.most_alive) == (300, 300, 128)  # 2,048 tokens at a time
    assert (rows.tolist(), nfe) == ([place % 10 for place in range(300)], 4)
    data, watch = load_data(DataConfig(split="all")), Watch()
    found = embed(watch, data)
    assert (watch.seen, watch.most_alive) == (1797, 256)
    assert torch.equal(found["features"], data.images().flatten(1).double())


def test_batches_on_a_gpu_follow_from_tokens_and_pixels():
    def batch_size(device, grid, side):
        tokenizer = SimpleNamespace(config=SimpleNamespace(image_size=(side, side)))
        return batch_size_for(
            SimpleNamespace(device=torch.device(device), sequence_length=grid**2, tokenizer=tokenizer)
        )

    assert [batch_size("cpu", grid, 512) for grid in (4, 7, 8, 16, 64)] == [128, 41, 32, 8, 1]
    large = batch_size("cuda", 64, 1024)
    assert 1 < large < batch_size("cuda", 16, 256) < batch_size("cuda", 4, 8)
    assert large * 3 * 1024**2 <= MAX_PIXELS
    assert batch_size("cuda", 64, 8192) == 1


def test_real_images_are_identified_by_their_bytes(digits):
    data = load_data(DataConfig(split="test"))
    found = [embed(Watch(), data.subset(range(start, start + 99)))["digests"] for start in (0, 99, 198)]
    pixels = (255 * digits).round().byte()
    digests = b"".join(hashlib.sha256(bytes(image.flatten().tolist())).digest() for image in pixels)
    expected = f"297 images of digits, sha256 {hashlib.sha256(digests).hexdigest()}"
    assert describe("digits", torch.cat(found)) == expected
    assert describe("digits", torch.cat(found).flip(0)) != expected


def test_a_bounded_reference_is_spread_over_the_data():
    assert spread(10, 20).tolist() == list(range(10))
    assert spread(1_000_000, 10_000).tolist() == list(range(0, 1_000_000, 100))
    rows = spread(1797, 1000)
    assert len(rows.unique()) == 1000
    assert (rows.diff() <= 2).all()
    assert len(Reference(Watch(), torch.rand(10_001, 2), "noise").neighbours) == 10_000
    reference = make_reference(Watch(), DataConfig(split="all"), 50)
    assert torch.equal(
        reference.real_features, load_data(DataConfig(split="all")).images()[spread(1797, 50)].flatten(1)
    )


def test_a_classifier_of_many_images_reads_those_that_are_drawn():
    labels, read = torch.arange(2 * 10**6) % 2, []

    class Rows:
        def __getitem__(self, numbers):
            read.append(len(numbers))
            return [torch.full((1, 8, 8), number % 2 / 2) for number in numbers]

    data = ImageData(Rows(), labels, ["dark", "light"], None, lambda row: row, "two shades")
    _, accuracy = train_classifier(data, data.subset(range(100)), num_steps=20, batch_size=16)
    assert accuracy == 1
    assert sum(read) < 1000


def test_processes_that_want_a_classifier_train_one(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "eval.classifier.train_classifier",
        lambda train, test, device: trained.append(train) or train_classifier(train, test, device, num_steps=2),
    )
    data = load_data(DataConfig(split="test"))
    names = [ClassifierFeatures.cached(tmp_path / "c", DataConfig(), data, data).name for _ in range(2)]
    assert (len(trained), names[0]) == (1, names[1])


def test_each_data_set_has_a_classifier_of_its_own(tmp_path, monkeypatch):
    """One folder for two data sets: the second comes while the first trains, and both come again."""
    few, many = load_data(DataConfig(split="test")), load_data(DataConfig())
    trained, names = [], {}

    def train(train, test, device):
        trained.append(len(train))
        if train is few:
            names["many"] = ClassifierFeatures.cached(tmp_path, DataConfig(), many, few).name
        return train_classifier(train, test, device, num_steps=2)

    monkeypatch.setattr("eval.classifier.train_classifier", train)
    names["few"] = ClassifierFeatures.cached(tmp_path, DataConfig(), few, few).name
    assert trained == [297, 1500]
    assert names["few"] != names["many"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    for name, data in [("few", few), ("many", many), ("few", few)]:
        assert ClassifierFeatures.cached(tmp_path, DataConfig(), data, few).name == names[name]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == files
    ClassifierFeatures.cached(tmp_path, DataConfig(label_column="other"), many, few)
    assert trained == [297, 1500, 1500]


def test_pictures_that_change_are_other_images(tmp_path):
    def pictures():
        return identify(load_data(DataConfig(name=str(tmp_path / "images"))))

    for name, shade in [("dark", 30), ("light", 220)]:
        (tmp_path / "images" / name).mkdir(parents=True)
        PIL.Image.new("L", (8, 8), shade).save(tmp_path / "images" / name / "0.png")
    first = pictures()
    assert first == pictures()
    PIL.Image.new("L", (8, 8), 31).save(tmp_path / "images" / "dark" / "0.png")
    assert first["num_images"] == pictures()["num_images"] == 2
    assert first != pictures()
    assert identify(load_data(DataConfig())) != identify(load_data(DataConfig(split="all")))


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

    def fake_generate(pipeline, features, num_images, *, conditions, seed, description, temperature):
        seeds.append((temperature, seed, num_images))
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_images, 2, generator=generator) + abs(temperature - 0.5), None, 1

    monkeypatch.setattr("eval.tuning.generate_features", fake_generate)
    grid = Grid((1.0, 0.5, 0.2), (1.0,), (1,), num_tuning_images=500, num_report_images=800)
    reference = Reference(Fake(), torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)), "fake")
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

    def fake_generate(pipeline, features, num_images, *, conditions, seed, description, temperature):
        images = torch.randn(num_images, 2, generator=torch.Generator().manual_seed(seed)) + abs(temperature - 0.5)
        return images, torch.zeros(num_images, dtype=torch.long), 1

    monkeypatch.setattr("eval.tuning.generate_features", fake_generate)
    grid = Grid((2.0, 1.0, 0.5), (1.0,), (1,), num_tuning_images=500, num_report_images=500)
    reference = Reference(Half(), torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)), "fake")
    row = tune_and_measure(None, grid.student_settings(), reference, grid, "fake", {"class_consistency": least})
    assert row["settings"] == {"temperature": chosen}


def test_the_monitor_writes_samples(teacher, tmp_path):
    measures = SampleMonitor(tmp_path / "run", DataConfig(name=""))(teacher, ClassLabels(torch.arange(10)), 7)
    assert measures == {}
    assert (tmp_path / "run" / "samples" / "step-000007.png").stat().st_size > 0


def test_the_monitor_measures_where_the_pipeline_is(teacher, tmp_path, monkeypatch):
    """Features on the pipeline's device, and as many heartbeats as batches of 1,000 images."""
    devices, beats = [], []

    def make(data, folder, device, class_names):
        devices.append(device)
        return Watch()

    monkeypatch.setattr("eval.monitor.make_features", make)
    monitor, classes = SampleMonitor(tmp_path / "run", DataConfig()), ClassLabels(torch.arange(10))
    measures = [monitor(teacher, classes, step, lambda: beats.append(1)) for step in (0, 7)]
    assert devices == [teacher.device]
    assert measures[0] == measures[1]
    assert measures[0].keys() == {"fd"}
    assert len(beats) == 2 * 8


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
        (Path(folder) / inception.WEIGHTS).write_bytes(b"a part")
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
    features = make_features(DataConfig(name=str(tmp_path / "images")), tmp_path / "classifier")
    assert features.test_accuracy == 1
