"""What a run may be begun in, what it may go on with, and what a refusal leaves behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from student_runs import furthest

from distill.config import load_config
from distill.jobs.clip import CLIPJob
from distill.jobs.run import MAY_CHANGE
from distill.jobs.student import StudentJob, load_student
from distill.jobs.teacher import TeacherJob, train_teacher
from distill.jobs.tokenizer import TokenizerJob
from distill.methods.dimo import DiMO
from teachers import MaskedDiffusionPipeline
from teachers.data import DataConfig, load_data
from teachers.sharing import hold
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.token_cache import write_token_cache

ROOT = Path(__file__).parents[3]
TINY = ["network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}", "tokenizer.codebook_size=16"]
TINY += ["training={num_steps: 2, batch_size: 8, tracker: none, log_every: 1}"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(monkeypatch, call):
    losses, calls = DiMO.losses, []

    def faulty(self, *arguments):
        calls.append(None)
        if len(calls) == call:
            raise FloatingPointError("it was too much")
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", faulty)


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


@pytest.mark.parametrize("resume", [[], ["training.resume=true"]], ids=["anew", "resumed"])
def test_a_job_that_failed_before_a_checkpoint_stops_no_other(run, monkeypatch, tmp_path, resume):
    plain, _, _ = run("plain", "initial.random_tokens=uniform")
    with pytest.raises(ValueError, match="for GPUs"):
        run("run", "teacher_dtype=bfloat16", "training.mixed_precision=bf16")
    fail_at(monkeypatch, 3)
    with pytest.raises(FloatingPointError):
        run("run", "initial.embedding_noise=0.1", *resume)
    monkeypatch.undo()
    weights, lines, _ = run("run", "initial.random_tokens=uniform", *resume)  # of what was prepared nothing is left
    assert furthest(weights, plain) == 0
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_images_of_many_sizes_stop_no_other_try(tmp_path):
    for number in range(5):  # fewer than a batch
        PIL.Image.new("L", (8 + number, 8), 40 * number).save(tmp_path / f"{number}.png")
    settings = [f"data.name={tmp_path}", "data.label_column=", f"output={tmp_path / 'run'}", *TINY]
    with pytest.raises((ValueError, RuntimeError)):
        train_teacher(load_config(TeacherJob, overrides=settings))
    assert train_teacher(
        load_config(TeacherJob, overrides=[*settings, "data.image_size=8", "tokenizer.codebook_size=4"])
    )
    assert len(MaskedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")(batch_size=2).images) == 2


def test_a_text_encoder_that_is_missing_stops_no_other_try(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned = ["data.text_column=text", "data.name=captioned", "output=run", "data.label_column=", *TINY]
    (tmp_path / "captioned").mkdir()
    for number in range(8):
        PIL.Image.new("L", (8, 8), 30 * number).save(tmp_path / "captioned" / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": "an image"}) for number in range(8)]
    (tmp_path / "captioned" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(FileNotFoundError, match="no CLIP"):
        train_teacher(load_config(TeacherJob, overrides=[*captioned, "tokenizer.codebook_size=4", "text_encoder=none"]))
    unconditional = [*captioned, "data.text_column=", "tokenizer.codebook_size=8"]
    assert train_teacher(load_config(TeacherJob, overrides=unconditional))
    assert MaskedDiffusionPipeline.from_pretrained("run/pipeline").codebook_size == 8


HAND_WRITTEN = "# mine\nteacher: {teacher}\ntraining:\n  num_steps: 6\n"
FOREIGN = {
    "another program's": {"config.yaml": "model:\n  target: ldm\n", "checkpoints/last.ckpt": "", "samples/a.png": ""},
    "hand-written": {"config.yaml": HAND_WRITTEN},
    "with weights": {"config.yaml": HAND_WRITTEN, "checkpoints/pretrained.safetensors": ""},
}


@pytest.mark.parametrize("resume", [[], ["training.resume=true"]], ids=["anew", "resumed"])
@pytest.mark.parametrize("whose", FOREIGN)
def test_nothing_that_no_run_wrote_is_overwritten_or_removed(run, tmp_path, whose, resume):
    for name, text in FOREIGN[whose].items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text.format(teacher=tmp_path / "teacher"))
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="not the folder of a run" if resume else "not empty"):
        run("run", *resume)
    assert files(tmp_path / "run") == before


def edit(folder):
    (folder / "config.yaml").write_text("# mine now\n" + (folder / "config.yaml").read_text())


def put_weights(folder):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "pretrained.safetensors").touch()


@pytest.mark.parametrize("change", [edit, put_weights])
def test_what_was_put_into_a_failed_run_is_not_begun_over(run, monkeypatch, tmp_path, change):
    fail_at(monkeypatch, 1)
    with pytest.raises(FloatingPointError):
        run("run")
    monkeypatch.undo()
    change(tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("interrupted", [[], ["training.max_steps=2", "training.log_every=5"]])
def test_a_run_that_saved_once_is_not_begun_over_when_its_checkpoints_are_gone(run, tmp_path, interrupted):
    run("run", *interrupted)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    assert files(tmp_path / "run") == before


def test_a_failed_run_of_before_runs_were_marked_is_only_resumed(run, monkeypatch, tmp_path):
    fail_at(monkeypatch, 1)
    with pytest.raises(FloatingPointError):
        run("run", "training.resume=true")
    monkeypatch.undo()
    (tmp_path / "run" / ".run").unlink()
    put_weights(tmp_path / "run")
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "a.png").touch()
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    assert run("run", "training.resume=true")[2] == 6
    assert {"samples/a.png", "checkpoints/pretrained.safetensors"} <= files(tmp_path / "run").keys()


def test_without_locks_no_run_is_begun_over(run, monkeypatch, tmp_path):
    """Another process may be at work in it, and nobody can tell."""

    def unknown(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", unknown)
    with monkeypatch.context() as failing:
        fail_at(failing, 3)
        with pytest.raises(FloatingPointError):
            run("run")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    assert files(tmp_path / "run") == before
    assert run("run", "training.resume=true")[2] == 6


def test_a_checkpoint_that_another_process_makes_until_the_folder_is_held_stays(run, monkeypatch, tmp_path):
    fail_at(monkeypatch, 1)
    with pytest.raises(FloatingPointError):
        run("run")
    monkeypatch.undo()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"

    def late(folder):
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
        return hold(folder)

    monkeypatch.setattr("distill.jobs.run.hold", late)
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    assert (checkpoint / "manifest.json").exists()


def test_what_is_not_a_run_s_or_was_learnt_is_not_begun_over(run, tmp_path):
    run("saved", "training.checkpoint_every=2")
    shutil.rmtree(tmp_path / "saved" / "checkpoints")  # to make room
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "saved" / "config.yaml", tmp_path / "other")
    (tmp_path / "other" / "precious").touch()
    for name in ("saved", "other"):
        before = files(tmp_path / name)
        with pytest.raises(ValueError, match="not empty"):
            run(name)
        assert files(tmp_path / name) == before


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


HOLDER = """
import sys, time
from pathlib import Path
from teachers.sharing import hold
print(hold(Path(sys.argv[1])), flush=True)
time.sleep(600)
"""


def test_a_folder_belongs_to_one_process_as_long_as_it_lives(tmp_path, run):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with pytest.raises(ValueError, match="another process is at work"):
        run("run")
    assert not files(tmp_path / "run").keys() - {".lock"}
    holder.kill()
    holder.communicate()
    assert run("run")[2] == 6
    assert hold(tmp_path / "run")
