"""Distillation of a teacher conditioned on text, from a published folder to an exported student."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from tiny_text import amused_folder, tiny_text_encoder

from distill.config import load_config
from distill.jobs.student import StudentJob, load_student, train_student
from students import OneStepPipeline
from teachers import MaskedDiffusionPipeline
from teachers.conditions import prompt_cache
from teachers.conditions.prompts import PromptConfig, load_prompts

PROMPTS = ["a red apple", "a green car", "house", "house"]


@pytest.fixture
def job(tmp_path):
    """Settings of a job of two steps on a tiny aMUSEd."""
    amused_folder(tmp_path / "amused")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    settings = [
        f"teacher={tmp_path / 'amused'}", f"output={tmp_path / 'run'}", f"prompts.name={tmp_path / 'prompts.txt'}",
        "training.num_steps=2", "training.batch_size=3", "training.tracker=none", "training.warmup_steps=0",
        "method.guidance_scale=4", "negative_prompt=green",
    ]  # fmt: skip

    def job(*overrides):
        return load_config(StudentJob, overrides=[*settings, *overrides])

    return job


@pytest.mark.parametrize("random_tokens", ["uniform", "marginal"])
def test_an_amused_folder_is_distilled_exported_and_read_back(job, tmp_path, command, random_tokens):
    assert train_student(job(f"initial.random_tokens={random_tokens}", "initial.embedding_noise=0.3"))
    student, _, step = load_student(tmp_path / "run")
    assert step == 2
    teacher = MaskedDiffusionPipeline.from_pretrained(tmp_path / "amused")
    changed = [
        name
        for name, parameter in student.denoiser.named_parameters()
        if not torch.equal(parameter, teacher.denoiser.get_parameter(name))
    ]
    assert any("transformer_layers" in name for name in changed)
    assert not any(".embed." in name or "mlm_layer" in name for name in changed)

    status, _, errors = command("export.py", tmp_path / "run", "--output", tmp_path / "one-step")
    assert status == 0, errors
    assert "text-to-image" in (tmp_path / "one-step" / "README.md").read_text()
    exported = OneStepPipeline.from_pretrained(tmp_path / "one-step")
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    ours, theirs = (
        pipe("a red car", generator=generator, output_type="pt")
        for pipe, generator in zip((student, exported), generators, strict=True)
    )
    assert torch.equal(ours.images, theirs.images)
    assert ours.images.shape == (1, 3, 8, 8)

    arguments = ["--prompt", "a car", "an apple", "--num-rows", 2, "--output", "grid.png"]
    assert command("sample.py", tmp_path / "one-step", *arguments)[0] == 0
    assert Path("grid.png").exists()
    status, _, errors = command("sample.py", tmp_path / "one-step", "--output", "grid.png")
    assert status != 0
    assert "--prompt" in errors


def test_the_text_encoder_is_let_go_before_the_first_step(job):
    encoders = []
    original = MaskedDiffusionPipeline.from_pretrained.__func__

    def monitor(pipeline, conditions, step, heartbeat):
        gc.collect()
        alive.append(encoders[0]() is not None)
        return {}

    class Watched(MaskedDiffusionPipeline):
        @classmethod
        def from_pretrained(cls, *arguments, **settings):
            pipeline = original(MaskedDiffusionPipeline, *arguments, **settings)
            encoders.append(weakref.ref(pipeline.text_encoder))
            return pipeline

    alive = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.jobs.student.MaskedDiffusionPipeline", Watched)
        train_student(job("training.evaluate_every=1"), monitor)
    assert alive == [False] * 3


CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip


@pytest.mark.slow
def test_memory_of_distillation_is_less_by_the_text_encoder(tmp_path, capsys):
    """`pytest -m slow -k memory -s` prints it: the text encoder of CLIP ViT-L/14, beside a tiny aMUSEd."""
    amused_folder(tmp_path / "amused", **CLIP_L)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    resident = {}
    for kept in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", MEASURED_JOB, str(tmp_path), str(int(kept))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        resident[kept] = int(run.stdout.splitlines()[-1]) / 1e6
    saved = resident[True] - resident[False]
    encoder = 4e-6 * sum(parameter.numel() for parameter in tiny_text_encoder(**CLIP_L)[0].parameters())
    with capsys.disabled():
        print(f"\nmemory in a step: {resident[False]:.0f} MB; were the text encoder kept: {resident[True]:.0f} MB")
        print(f"saved {saved:.0f} MB; the text encoder's weights are {encoder:.0f} MB")
    assert saved > 0.9 * encoder


MEASURED_JOB = """
import sys
import psutil
import distill.jobs.student as student_job
from distill.config import load_config

folder, kept = sys.argv[1], []
load_teacher = student_job.load_teacher

def load_and_keep(name):
    teacher = load_teacher(name)
    kept.append(teacher.text_encoder if int(sys.argv[2]) else None)
    return teacher

student_job.load_teacher = load_and_keep
job = load_config(student_job.StudentJob, overrides=[
    f"teacher={folder}/amused", f"prompts.name={folder}/prompts.txt", f"output={folder}/run-{sys.argv[2]}",
    "training.num_steps=3", "training.batch_size=4", "training.tracker=none", "training.evaluate_every=1",
])
resident = []

def measure(pipeline, conditions, step, heartbeat):
    resident.append(psutil.Process().memory_info().rss)
    return {}

student_job.train_student(job, measure)
print(resident[-1])
"""


def test_runs_share_the_encoded_prompts(job, tmp_path, monkeypatch):
    train_student(job())
    (folder,) = (tmp_path / "prompts").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache, "encode_prompts", lambda *arguments: pytest.fail("they are encoded again"))
        train_student(job(f"output={tmp_path / 'another'}"))
    train_student(job(f"output={tmp_path / 'third'}", f"prompts.cache={tmp_path / 'elsewhere'}"))
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [folder.name]


def test_prompts_of_every_kind(job, tmp_path, caplog):
    teacher = MaskedDiffusionPipeline.from_pretrained(tmp_path / "amused")
    with torch.no_grad():
        empty = teacher.encode_condition("")
        assert torch.equal(empty.states, empty.null_states)  # the empty prompt is the teacher's negative one
        long = teacher.encode_condition(["car " * 2500, "car"])
    assert "1 of 3 prompts are longer than 12 tokens" in caplog.text
    assert long.states.shape == (2, 12, 16)
    for wrong in ([3], [None], ["fine", b"bytes"]):
        with pytest.raises(ValueError, match=f"prompt {len(wrong) - 1} is .*; prompts are text"):
            teacher.encode_condition(wrong)
    with pytest.raises(ValueError, match="empty list of prompts"):
        teacher([])
    with pytest.raises(ValueError, match="one of prompt, class_labels and condition"):
        teacher()


def test_missing_prompts_are_named(job, tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.name"):
        train_student(job("prompts.name="))
    with pytest.raises(FileNotFoundError, match=r"no file of prompts .*none\.txt"):
        load_prompts(PromptConfig(name=str(tmp_path / "none.txt")))


def test_a_missing_column_is_named(tmp_path):
    datasets.Dataset.from_dict({"caption": ["a", "b"]}).to_parquet(tmp_path / "prompts.parquet")
    config = PromptConfig(name=str(tmp_path / "prompts.parquet"), column="caption")
    assert load_prompts(config) == ["a", "b"]
    with pytest.raises(ValueError, match="no column 'text'; it has caption"):
        load_prompts(PromptConfig(name=str(tmp_path / "prompts.parquet")))
