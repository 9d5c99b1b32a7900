"""Disks that are full or may not be written to, under the commands that write."""

import contextlib
import json
import subprocess

import pytest
from safetensors import SafetensorError

from distill.config import load_config
from distill.jobs.teacher import TeacherJob, train_teacher
from distill.loop import lines as lines_module
from distill.loop.checkpoint import newest_checkpoint
from distill.loop.lines import append_line, read_lines, trim_lines
from teachers import MaskedDiffusionPipeline

TRAINING = "training={num_steps: 6, batch_size: 8, log_every: 1, checkpoint_every: 2, evaluate_every: 3}"
NETWORK = "network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}"


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of a size at tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()

    @contextlib.contextmanager
    def mounted(options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs takes rights that this user has not")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)  # this process has its lock still

    return mounted


def check_one_line(status, errors):
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (status, len(said)) == (2, 1), errors
    assert "Traceback" not in errors


def leftovers(folder):
    return [path.name for path in folder.rglob("*.staging*")]


@pytest.mark.parametrize("size", ["4k", "40k", "160k", "300k"])
def test_training_on_a_disk_that_is_full_ends_with_one_line_and_whole_files(teacher, command, disk, size):
    """With little room nothing can be prepared; with some more a checkpoint, or two, can be made."""
    teacher.save_pretrained("teacher")
    with disk(f"size={size}") as folder:
        status, _, errors = command("train_student.py", "teacher=teacher", f"output={folder / 'run'}", TRAINING)
        check_one_line(status, errors)
        assert not leftovers(folder)
        for checkpoint in folder.glob("run/checkpoints/step-*"):
            assert newest_checkpoint(folder / "run" / "checkpoints") >= checkpoint
        for path in folder.glob("run/*.jsonl"):
            assert all(line["step"] <= 6 for line in map(json.loads, path.read_text().splitlines()))


@pytest.mark.parametrize("options", ["size=1m,ro", "size=20k"], ids=["read-only", "full"])
def test_an_export_that_does_not_fit_leaves_nothing(teacher, command, disk, options):
    teacher.save_pretrained("teacher")
    settings = [
        "teacher=teacher",
        "output=run",
        "monitor.name=",
        "training={num_steps: 1, batch_size: 8, tracker: none}",
    ]
    assert command("train_student.py", *settings)[0] == 0
    with disk(options) as folder:
        check_one_line(*command("export.py", "run", "--output", folder / "one")[::2])
        assert not list(folder.iterdir())
        check_one_line(*command("train_student.py", *settings, f"output={folder / 'run'}")[::2])
        assert not leftovers(folder)
    status, _, errors = command("export.py", "run", "--output", "one")
    assert status == 0, errors


def test_a_teacher_that_does_not_fit_is_written_when_there_is_room(disk, monkeypatch):
    save = MaskedDiffusionPipeline.save_pretrained

    def save_on_a_full_disk(pipeline, *arguments, **options):
        with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 10))
        save(pipeline, *arguments, **options)

    with disk("size=2m") as folder:
        filling = folder / "filling"
        settings = [f"output={folder / 'run'}", NETWORK, "tokenizer.codebook_size=16", "data.split=test"]
        settings += ["training={num_steps: 2, batch_size: 8, tracker: none}"]
        with monkeypatch.context() as patch:
            patch.setattr(MaskedDiffusionPipeline, "save_pretrained", save_on_a_full_disk)
            with pytest.raises((OSError, SafetensorError)):
                train_teacher(load_config(TeacherJob, overrides=settings))
        assert not (folder / "run" / "pipeline").exists()
        assert not leftovers(folder / "run")
        filling.unlink()
        assert train_teacher(load_config(TeacherJob, overrides=[*settings, "training.resume=true"]))
        assert len(MaskedDiffusionPipeline.from_pretrained(folder / "run" / "pipeline")([3]).images) == 1


def test_a_line_is_whole_or_not_there(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})

    def half(values):
        with path.open("a") as file:
            file.write('{"step": ')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lines_module.json, "dumps", half)
        append_line(path, {"step": 2})
    assert "could not be written" in caplog.text
    append_line(path, {"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
    with path.open("a") as file:
        file.write('{"step": ')  # killed
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
    trim_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n'
