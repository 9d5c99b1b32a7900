"""Which stages a recipe launches, with what, and what it makes of an interruption."""

import shutil
from pathlib import Path

import pytest

from distill.jobs import recipe as recipe_module
from distill.jobs.recipe import Recipe

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def launched(monkeypatch):
    """What was launched: (script, settings); each makes what it is to make, but for those in `interrupted`."""
    calls, interrupted = {}, set()

    def launch(script, config, output, *settings):
        calls[script.name, output.name] = [config.relative_to(CONFIGS).as_posix(), *settings]
        if script.name not in interrupted:
            for result in ("tokenizer", "pipeline", "clip"):
                (output / result).mkdir(parents=True, exist_ok=True)

    def encode(command):
        calls["cache_tokens.py", "tokens"] = command[2:]
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir()
        (folder / "index.json").touch()

    class Job:
        class training:
            num_steps = 7

    monkeypatch.setattr(recipe_module, "launch", launch)
    monkeypatch.setattr(recipe_module, "call", encode)
    monkeypatch.setattr(recipe_module, "load_student", lambda run: (None, Job, 3 if "half" in interrupted else 7))
    calls["interrupted"] = interrupted
    return calls


def scripts(calls):
    return [name for name in calls if name != "interrupted"]


def test_digits_need_a_teacher_and_a_student(launched, tmp_path):
    Recipe(CONFIGS / "digits", Path("scripts"), tmp_path, seed=5, student_settings=["method.beta=1"]).train()
    assert scripts(launched) == [("train_teacher.py", "teacher"), ("train_student.py", "student")]
    teacher, student = launched["train_teacher.py", "teacher"], launched["train_student.py", "student"]
    assert teacher[:2] == ["digits/teacher.yaml", "training.seed=5"]
    assert {f"teacher={tmp_path / 'teacher' / 'pipeline'}", "monitor.name=digits", "training.seed=5"} <= set(student)
    assert student[-1] == "method.beta=1"
    launched.clear()
    Recipe(CONFIGS / "digits", Path("scripts"), tmp_path).train()
    assert not launched  # all of it is there


def test_captions_need_tokens_and_two_clips(launched, tmp_path):
    Recipe(CONFIGS / "emoji", Path("scripts"), tmp_path, data="mine", image_column="picture").train()
    assert scripts(launched) == [
        ("train_tokenizer.py", "tokenizer"), ("cache_tokens.py", "tokens"), ("train_clip.py", "clip"),
        ("train_clip.py", "scoring-clip"), ("train_teacher.py", "teacher"), ("train_student.py", "student"),
    ]  # fmt: skip
    assert "training.seed=1000" in launched["train_clip.py", "scoring-clip"]
    assert {"data.name=mine", "data.image_column=picture"} <= set(launched["train_tokenizer.py", "tokenizer"])
    assert {"name=mine", "image_column=picture"} <= set(launched["cache_tokens.py", "tokens"])
    teacher = set(launched["train_teacher.py", "teacher"])
    assert {f"tokens={tmp_path / 'tokens'}", f"text_encoder={tmp_path / 'clip' / 'clip'}"} <= teacher
    assert {"prompts.name=mine", "prompts.column=text"} <= set(launched["train_student.py", "student"])


def test_an_interrupted_stage_is_said_and_made_again(launched, tmp_path):
    launched["interrupted"].add("train_teacher.py")
    with pytest.raises(ValueError, match="the teacher's training was interrupted; run the same command again"):
        Recipe(CONFIGS / "digits", Path("scripts"), tmp_path).train()
    launched["interrupted"].clear()
    launched["interrupted"].add("half")
    with pytest.raises(ValueError, match="the distillation was interrupted"):
        Recipe(CONFIGS / "digits", Path("scripts"), tmp_path).train()
    launched["interrupted"].clear()
    Recipe(CONFIGS / "digits", Path("scripts"), tmp_path).train()
    assert (tmp_path / "student" / "finished").exists()


def test_a_teacher_that_is_given_is_not_trained(launched, tmp_path):
    (tmp_path / "given").mkdir()
    Recipe(CONFIGS / "mnist", Path("scripts"), tmp_path / "run", teacher=tmp_path / "given").train()
    assert scripts(launched) == [("train_student.py", "student")]
    assert f"teacher={tmp_path / 'given'}" in launched["train_student.py", "student"]
    shutil.rmtree(tmp_path / "given")
