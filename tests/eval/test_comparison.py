"""The measuring half of the quickstart, on the tiny teacher, with features that cost nothing."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_text import amused_folder

from distill.methods.dimo import DiMO
from eval.comparison import CaptionComparison, Comparison
from eval.evaluate import Reference
from eval.tuning import Grid
from students import OneStepPipeline, TokenInitialiser
from teachers import MaskedDiffusionPipeline
from teachers.data import DataConfig, load_data

GRID = Grid((1.0, 0.5), (1.0, 1.5), (1, 2), num_tuning_images=20, num_report_images=30)


class Pixels:
    name, distance_names = "pixels", ("fd", "kd")

    def __call__(self, images):
        return images.flatten(1)[:, ::4]

    def judge(self, features, rows):
        return {"class_consistency": features.mean().item()}


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path, DataConfig(), GRID, seed=0)


def test_from_measurements_to_the_report(comparison, teacher, digits, tmp_path):
    reference = Reference(Pixels(), Pixels()(digits), "297 digits")
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    comparison.measure_teacher(teacher, reference)
    comparison.measure(teacher, student, reference)
    rows = comparison.card_rows()
    assert (rows[0][""], rows[0]["steps"], rows[0]["nfe"]) == ("student", 1, 1.0)
    assert [row["steps"] for row in rows[1:]] == [1, 2]
    assert comparison.student_temperature() in (1.0, 0.5)
    comparison.time(teacher, student)
    about = {"method": DiMO, "settings": {"Student": "seed: 0"}, "seconds": {"teacher": 1.0, "student": 2.0}}
    summary = comparison.summarise(teacher, student, reference, **about)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_teacher"] == min(summary["teacher"], key=lambda row: row["fd"])
    speeds = [row["images_per_second"] for row in (summary["student"], summary["best_teacher"])]
    assert summary["speedup_vs_best_teacher"] == pytest.approx(speeds[0] / speeds[1])
    assert summary["wall_seconds"]["total"] == 3
    assert summary["protocol"]["Real images"] == "297 digits"
    page = (tmp_path / "report.html").read_text()
    assert "distilled with Di[M]O" in page
    assert {"samples.png", "quality.png", "measurements.json", "speed.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_teacher_is_measured_again_through_other_features(comparison, teacher, digits):
    reference = Reference(Pixels(), Pixels()(digits), "297 digits")
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    comparison.grid = Grid((1.0,), (1.0,), (1,), num_tuning_images=20, num_report_images=20)
    comparison.measure_teacher(teacher, reference)
    kept = json.loads(comparison.teacher_rows.read_text())
    known, before = kept["rows"][0]["fd"], {key: kept[key] for key in ("grid", "rows")}
    assert known != -1.0
    for features, measured in [("pixels", -1.0), (None, -1.0), ("pixels of another classifier", known)]:
        before["rows"][0]["fd"] = -1.0
        comparison.teacher_rows.write_text(json.dumps(before | ({"features": features} if features else {})))
        comparison.measure(teacher, student, reference)
        assert json.loads(comparison.measurements.read_text())["teacher"][0]["fd"] == measured


def test_too_few_images_are_said_before_any_is_made(comparison, teacher, digits, monkeypatch):
    monkeypatch.setattr("eval.tuning.generate_features", lambda *given, **settings: pytest.fail("images were made"))
    with pytest.raises(ValueError, match="there are 3 real images"):
        comparison.measure_teacher(teacher, Reference(Pixels(), Pixels()(digits[:3]), "3 digits"))
    for few in ({"num_tuning_images": 1}, {"num_report_images": 3}):
        comparison.grid = replace(GRID, **few)
        with pytest.raises(ValueError, match="what is measured needs at least"):
            comparison.measure_teacher(teacher, Reference(Pixels(), Pixels()(digits), "297 digits"))


def test_a_classifier_is_taken_over_whole(comparison, tmp_path, monkeypatch):
    (tmp_path / "run" / "classifier").mkdir(parents=True)

    def copy(source, folder, **settings):
        (folder / "half").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copytree", copy)
    with pytest.raises(OSError, match="no space"):
        comparison.take_over(tmp_path / "run")
    assert not comparison.classifier.exists()


def test_what_another_run_measured_is_taken_over_if_it_was_as_careful(comparison, tmp_path):
    for name, grid in [("same", GRID), ("coarser", Grid((1.0,), (1.0,), (1,), 20, 30))]:
        run = tmp_path / name
        (run / "classifier").mkdir(parents=True)
        (run / "classifier" / "weights").write_text(name)
        other = Comparison(run, DataConfig(), grid, seed=0)
        other.teacher_rows.write_text(json.dumps({"grid": other._grid_as_json(), "rows": []}))
    mine = Comparison(tmp_path / "mine", DataConfig(), GRID, seed=0)
    mine.output.mkdir()
    mine.take_over(tmp_path / "coarser")
    assert (mine.classifier / "weights").read_text() == "coarser"
    assert not mine.teacher_rows.exists()
    theirs = Comparison(tmp_path / "theirs", DataConfig(), GRID, seed=0)
    theirs.output.mkdir()
    theirs.take_over(tmp_path / "same")
    assert theirs.teacher_rows.exists()


def test_captions_are_measured_on_the_test_split_by_a_clip(pictures, clip_folder, tmp_path):
    data = load_data(DataConfig(name=str(pictures), text_column="text", label_column="", num_channels=3))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        shutil.copy(pictures / "train.parquet", folder / f"{split}.parquet")
    teacher = MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path / "amused"))
    student = OneStepPipeline(
        teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher), teacher.text_encoder,
        teacher.text_tokenizer,
    )  # fmt: skip
    about = DataConfig(name=str(folder), text_column="text", label_column="", num_channels=3)
    comparison = CaptionComparison(tmp_path, about, GRID, seed=0, scoring_clip=clip_folder)
    reference = comparison.reference(teacher)
    assert comparison.prompts() == data.texts[:10]
    comparison.measure_teacher(teacher, reference)
    comparison.measure(teacher, student, reference)
    assert "clip_score" in comparison.card_rows()[0]
    comparison.timed_batch = 2
    comparison.time(teacher, student)
    summary = comparison.summarise(teacher, student, reference, method=DiMO, settings={}, seconds={"student": 1.0})
    real = summary["real_test_images"]
    assert real["clip_score"] > max(row["clip_score"] for row in (*summary["teacher"], summary["student"]))
    assert "A row per prompt" in (tmp_path / "report.html").read_text()
