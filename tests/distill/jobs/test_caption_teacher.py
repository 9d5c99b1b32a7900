"""A teacher conditioned on captions, from pictures to a one-step student."""

import json

import pytest

from distill.config import load_config
from distill.jobs.student import StudentJob, load_student, train_student
from distill.jobs.teacher import TeacherJob, train_teacher
from eval.monitor import SampleMonitor
from teachers import MaskedDiffusionPipeline
from teachers.networks.amused import AmusedDenoiser

TRAINING = ["training.num_steps=3", "training.batch_size=8", "training.tracker=none", "training.evaluate_every=3"]


def data_settings(prefix, pictures):
    settings = {"name": pictures, "text_column": "text", "label_column": "", "num_channels": 3}
    return [f"{prefix}.{key}={value}" for key, value in settings.items()]


@pytest.fixture
def teacher_job(pictures, clip_folder, tmp_path):
    return [
        *TRAINING, *data_settings("data", pictures), f"text_encoder={clip_folder}", f"scoring_clip={clip_folder}",
        f"output={tmp_path / 'teacher'}", "tokenizer.patch_size=4", "tokenizer.codebook_size=16",
        "network.hidden_size=32", "network.num_layers=1", "network.num_attention_heads=2", "network.mlp_size=32",
        "sampler.num_inference_steps=4",
    ]  # fmt: skip


def test_captions_condition_a_teacher_and_its_student(teacher_job, pictures, clip_folder, tmp_path):
    job = load_config(TeacherJob, overrides=teacher_job)
    assert train_teacher(job, SampleMonitor(tmp_path / "teacher", job.data, job.scoring_clip))
    lines = (tmp_path / "teacher" / "metrics.jsonl").read_text().splitlines()
    measured = [line for line in map(json.loads, lines) if "clip_score" in line]
    assert [line["step"] for line in measured] == [0, 3]
    assert {"fd", "retrieval_accuracy"} <= set(measured[0])

    teacher = MaskedDiffusionPipeline.from_pretrained(tmp_path / "teacher" / "pipeline")
    assert isinstance(teacher.denoiser, AmusedDenoiser)
    output = teacher(["a red square", "a blue bar"], guidance_scale=2.0, output_type="pt")
    assert output.images.shape == (2, 3, 16, 16)
    assert output.nfe == 8

    overrides = [
        *TRAINING, f"teacher={tmp_path / 'teacher' / 'pipeline'}", f"output={tmp_path / 'student'}",
        f"prompts.name={pictures}", *data_settings("monitor", pictures), f"scoring_clip={clip_folder}",
    ]  # fmt: skip
    job = load_config(StudentJob, overrides=overrides)
    assert train_student(job, SampleMonitor(tmp_path / "student", job.monitor, job.scoring_clip))
    student, _, _ = load_student(tmp_path / "student")
    assert student("a red square", output_type="pt").images.shape == (1, 3, 16, 16)
    assert len(list((tmp_path / "student" / "samples").glob("*.png"))) == 2


def test_what_is_missing_is_named(teacher_job, clip_folder):
    for override, message in [
        ("data.text_column=", r"captions for the text_encoder.*data\.text_column"),
        ("text_encoder=", r"name a text_encoder.*unconditional"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_teacher(load_config(TeacherJob, overrides=[*teacher_job, override]))
    with pytest.raises(ValueError, match="no column 'caption'"):
        train_teacher(load_config(TeacherJob, overrides=[*teacher_job, "data.text_column=caption"]))
    with pytest.raises(FileNotFoundError, match="no CLIP at nowhere"):
        train_teacher(load_config(TeacherJob, overrides=[*teacher_job, "text_encoder=nowhere"]))
