"""What a run may go on with, and what a refusal leaves behind."""

import dataclasses
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from student_runs import TINY, files, furthest

from distill.config import load_config
from distill.jobs.clip import CLIPJob
from distill.jobs.run import MAY_CHANGE
from distill.jobs.student import StudentJob, load_student
from distill.jobs.teacher import TeacherJob, train_teacher
from distill.jobs.tokenizer import TokenizerJob
from teachers import MaskedDiffusionPipeline
from teachers.data import DataConfig, load_data
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.token_cache import write_token_cache

ROOT = Path(__file__).parents[3]


@pytest.fixture
def replaced(teacher, tmp_path):
    """Puts another teacher of the same shape where the run's was."""

    def replace(part):
        shutil.rmtree(tmp_path / "teacher")
        network = getattr(teacher, part)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.mul_(0.9)
        teacher.save_pretrained(tmp_path / "teacher")

    return replace


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("adapter_rank=4", "adapter_rank=0, not 4"),
        ("training.batch_size=16", "batch_size=8, not 16"),
        ("training.seed=3", "seed=0, not 3"),
        ("initial.mask_ratio=[0.5,0.7]", r"mask_ratio=\[0.6, 0.6\], not \[0.5, 0.7\]"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(run, tmp_path, setting, values):
    run("run", "training.max_steps=2")
    before, (learnt, _, _) = files(tmp_path / "run"), load_student(tmp_path / "run")
    with pytest.raises(ValueError, match=values):
        run("run", "training.resume=true", setting)
    assert files(tmp_path / "run") == before
    assert furthest(load_student(tmp_path / "run")[0].denoiser.state_dict(), learnt.denoiser.state_dict()) == 0


def test_a_teacher_s_run_does_not_go_on_with_another_network_or_tokenizer(tmp_path):
    settings = [f"output={tmp_path / 'run'}", *TINY]
    train_teacher(load_config(TeacherJob, overrides=settings))
    before = files(tmp_path / "run")
    for setting, values in {
        "network.hidden_size=32": r"network\.hidden_size=16, not 32",
        "tokenizer.codebook_size=20": r"tokenizer\.codebook_size=16, not 20",
        "objective.name=unknown": "choose from",
    }.items():
        with pytest.raises(ValueError, match=values):
            train_teacher(load_config(TeacherJob, overrides=[*settings, setting, "training.resume=true"]))
    assert files(tmp_path / "run") == before


def image_folder(folder, names, shade=0):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for image in range(4):
            PIL.Image.new("L", (8, 8), shade + 40 * number + 10 * image).save(folder / name / f"{image}.png")


def train_on(folder, *overrides):
    settings = [f"output={folder.parent / 'run'}", *TINY, "tokenizer.codebook_size=4", f"data.name={folder}"]
    return train_teacher(load_config(TeacherJob, overrides=[*settings, *overrides]))


def test_data_may_be_moved_but_not_be_others(tmp_path, monkeypatch):
    image_folder(tmp_path / "images", ["cat", "dog"])
    train_on(tmp_path / "images", "training.max_steps=1")
    before = files(tmp_path / "run")
    image_folder(tmp_path / "others", ["cat", "emu"])
    image_folder(tmp_path / "more", ["cat", "dog", "emu"])
    for name in ("others", "more"):
        with pytest.raises(ValueError, match="class_names"):
            train_on(tmp_path / name, "training.resume=true")
    assert files(tmp_path / "run") == before
    shutil.move(tmp_path / "images", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert train_on(Path("moved"), f"output={tmp_path / 'run'}", "training.resume=true")


def test_tokens_may_be_moved_but_not_be_of_another_tokenizer(tmp_path):
    data = load_data(DataConfig(split="train[:64]"))
    for name, size in {"tokens": 16, "others": 8}.items():
        tokenizer = PatchTokenizer.fit(data.images(), patch_size=2, codebook_size=size)
        write_token_cache(tmp_path / name, tokenizer, DataConfig(split="train[:64]"), data)
    images = tmp_path / "none"
    train_on(images, f"tokens={tmp_path / 'tokens'}", "training.max_steps=1")
    with pytest.raises(ValueError, match="another tokenizer"):
        train_on(images, f"tokens={tmp_path / 'others'}", "training.resume=true")
    shutil.move(tmp_path / "tokens", tmp_path / "moved")
    assert train_on(images, f"tokens={tmp_path / 'moved'}", "training.resume=true")


@pytest.mark.parametrize(("names", "goes_on"), [(["1", "2", "3"], True), (["1", "2", "10"], False)])
def test_a_run_of_before_data_were_noted_does_not_go_on_with_permuted_labels(tmp_path, names, goes_on):
    image_folder(tmp_path / "images", names)
    train_on(tmp_path / "images", "training.max_steps=1")
    (tmp_path / "run" / "sources.json").unlink()
    before = files(tmp_path / "run")
    if goes_on:
        assert train_on(tmp_path / "images", "training.resume=true")
        return
    with pytest.raises(ValueError, match="as text"):
        train_on(tmp_path / "images", "training.resume=true")
    assert files(tmp_path / "run") == before


def test_a_refusal_after_the_settings_were_compared_changes_nothing_either(run, replaced, tmp_path):
    run("run", "training.max_steps=2")
    before = files(tmp_path / "run")
    replaced("denoiser")
    with pytest.raises(ValueError, match="not the teacher of"):
        run("run", "training.resume=true", "training.learning_rate=0.5")
    assert files(tmp_path / "run") == before


def test_settings_that_may_change_are_taken_and_noted(run, tmp_path):
    settings = ["training.num_steps=6", "training.max_steps=2"]
    run("run", *settings, "training.learning_rate_schedule=cosine")
    others = ["training.num_steps=8", "training.gradient_accumulation_steps=2", "training.log_every=2"]
    _, lines, step = run("run", *others, "training.resume=true", "training.learning_rate_schedule=cosine")
    assert step == 8
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    assert load_config(StudentJob, tmp_path / "run" / "config.yaml").training.num_steps == 8


def test_the_names_of_classes_go_from_the_data_to_the_student(run, teacher, tmp_path):
    names = [f"a {number}" for number in range(10)]
    parts = teacher.denoiser, teacher.tokenizer, teacher.sampler
    MaskedDiffusionPipeline(*parts, class_names=names).save_pretrained(tmp_path / "named")
    seen = []
    run("run", f"teacher={tmp_path / 'named'}", monitor=lambda pipeline, *_: seen.append(pipeline.class_names) or {})
    assert [*seen, load_student(tmp_path / "run")[0].class_names] == [names] * 2
    train_teacher(load_config(TeacherJob, overrides=[f"output={tmp_path / 'digits'}", *TINY]))
    trained = MaskedDiffusionPipeline.from_pretrained(tmp_path / "digits" / "pipeline")
    assert trained.class_names == load_data(DataConfig()).class_names


def test_every_setting_that_may_change_is_one():
    known = set()
    for job in (StudentJob(), TeacherJob(), TokenizerJob(), CLIPJob()):
        for field in dataclasses.fields(job):
            value = getattr(job, field.name)
            known.add(field.name)
            if dataclasses.is_dataclass(value):
                known |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(value)}
    assert set(MAY_CHANGE) <= known


def test_a_resumed_run_learns_at_its_new_rates(run):
    """From the third step on exactly as a run that had them from the first, which stands still at the rates of zero."""
    settings = ["training.warmup_steps=0", "training.max_steps=2"]
    new = ["training.learning_rate=0.004", "method.auxiliary_learning_rate=0.02"]
    run("run", *settings, "training.learning_rate=1e-30", "method.auxiliary_learning_rate=1e-30")
    run("whole", *settings)
    _, lines, _ = run("run", *new, "training.warmup_steps=0", "training.resume=true")
    assert [line["learning_rate"] for line in lines] == [1e-30, 1e-30, 0.004, 0.004, 0.004, 0.004]
    moved = [line["divergence"] for line in lines]
    assert moved[1] < 1e-6 < moved[-1]  # auxiliary and teacher come apart only now
    _, lines, _ = run(
        "whole", *new, "training.warmup_steps=4", "training.resume=true", "training.learning_rate_schedule=linear"
    )
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([0.003, 0.004, 0.002, 0.0])


@pytest.mark.parametrize("part", ["denoiser", "tokenizer"])
def test_a_student_is_exported_with_its_own_teacher_alone(run, replaced, tmp_path, command, part):
    run("run", "adapter_rank=2")
    replaced(part)
    status, _, errors = command("export.py", tmp_path / "run", "--output", "one")
    assert status == 2
    assert f"another {part}" in errors.splitlines()[-1]
    assert not Path("one").exists()


def test_a_run_of_the_time_before_teachers_were_noted(run, tmp_path, caplog):
    run("run", "training.max_steps=2")
    (tmp_path / "run" / "sources.json").unlink()
    run("run", "training.resume=true")
    assert "not known" in caplog.text
    assert (tmp_path / "run" / "sources.json").exists()


def test_the_teacher_is_found_from_anywhere_and_where_it_was_moved(run, tmp_path, monkeypatch, command):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run("run", "teacher=teacher")
    monkeypatch.chdir(tmp_path / "elsewhere")
    student, job, _ = load_student(tmp_path / "run")
    assert job.teacher == "teacher"  # as it was typed
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="--teacher") as error:
        load_student(tmp_path / "run")
    assert "internet" not in str(error.value)
    status, _, errors = command("export.py", "../run", "--teacher", "../moved", "--output", "one")
    assert status == 0, errors
    with safe_open(next(Path("one/denoiser").glob("*.safetensors")), "pt") as weights:
        assert weights.metadata()["teacher"] == "../moved"
    again, _, _ = load_student(tmp_path / "run", teacher_name="../moved")
    assert furthest(again.denoiser.state_dict(), student.denoiser.state_dict()) == 0
    run("run", "teacher=../moved", "training.resume=true", "training.num_steps=7")
    assert load_student(tmp_path / "run")[2] == 7
