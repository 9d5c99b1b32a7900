"""What a run may be begun in, and what it leaves alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from student_runs import TINY, fail_at, files, furthest

from distill.config import load_config
from distill.jobs.teacher import TeacherJob, train_teacher
from teachers import MaskedDiffusionPipeline
from teachers.sharing import hold

ROOT = Path(__file__).parents[3]


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
