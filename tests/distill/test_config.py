import re
from dataclasses import replace
from pathlib import Path

import pytest

from distill.config import load_config, parse_arguments, to_yaml
from distill.jobs.clip import CLIPJob
from distill.jobs.student import StudentJob
from distill.jobs.teacher import TeacherJob
from distill.jobs.tokenizer import TokenizerJob

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS = {"teacher": TeacherJob, "tokenizer": TokenizerJob, "clip": CLIPJob, "student": StudentJob}


def written(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_overrides(tmp_path):
    path = written(
        tmp_path, "output: from-file\nmethod: {beta: 0.5, guidance_scale: 3}\ninitial: {mask_ratio: [0.2, 0.4]}"
    )
    job = load_config(StudentJob, path, ["method.beta=-0.2", "training.num_steps=7"])
    assert (job.output, job.method.beta, job.method.guidance_scale) == ("from-file", -0.2, 3.0)
    assert tuple(job.initial.mask_ratio) == (0.2, 0.4)
    assert job.training.num_steps == 7
    assert job.training.batch_size == StudentJob().training.batch_size


@pytest.mark.parametrize("config_class", [StudentJob, TeacherJob])
def test_printed_settings_read_back(config_class, tmp_path):
    job = config_class(output="elsewhere")
    assert load_config(config_class, written(tmp_path, to_yaml(job))) == job


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("methd: {beta: 1}", [], "unknown setting methd; did you mean method?"),
        ("", ["method.bta=1"], "unknown setting method.bta; did you mean method.beta?"),
        ("", ["training.nonsense_of_a_name=1"], "unknown setting training.nonsense_of_a_name; known are"),
        ("", ["training.num_steps=many"], "training.num_steps"),
        ("", ["training.batch_size=0"], "training.batch_size=0 must be at least 1"),
        ("", ["initial.mask_ratio=[0.9,0.1]"], "initial.mask_ratio=[0.9, 0.1]"),
        ("", ["initial.random_tokens=gaussian"], "initial.random_tokens='gaussian'"),
        ("", ["method.weighting=dmd"], "weighting='dmd'"),
        ("", ["training.learning_rate=nan"], "training.learning_rate=nan"),
        ("", ["output"], "'output' is not of the form key=value"),
        ("- a\n- list", [], "must hold settings as `key: value`"),
        ("a: [1", [], "not a YAML file"),
        ("output: !!python/object/apply:os.getcwd []", [], "not a YAML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(StudentJob, written(tmp_path, text), overrides)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no configuration file nowhere\.yaml"):
        load_config(StudentJob, "nowhere.yaml")


def test_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(StudentJob, "", ["--dry-run", "method.beta=0.25"])
    assert stopped.value.code == 0
    shown = load_config(StudentJob, written(tmp_path, capsys.readouterr().out))
    assert shown == replace(StudentJob(), method=replace(StudentJob().method, beta=0.25))

    with pytest.raises(SystemExit) as stopped:
        parse_arguments(StudentJob, "", ["method.bta=1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")

    with pytest.raises(SystemExit):
        parse_arguments(StudentJob, "", ["--help"])
    assert "method.auxiliary_updates" in capsys.readouterr().out


def test_options_and_overrides_come_in_any_order():
    job = parse_arguments(StudentJob, "", ["method.beta=0.25", "--max-steps", "3", "training.num_steps=7"])
    assert (job.method.beta, job.training.max_steps, job.training.num_steps) == (0.25, 3, 7)


def test_the_word_no_is_a_word(tmp_path):
    for source in [
        {"overrides": ["training.mixed_precision=no"]},
        {"path": written(tmp_path, "training: {mixed_precision: no}")},
    ]:
        assert load_config(StudentJob, **source).training.mixed_precision == "no"


def test_what_a_setting_was_called_before_is_taken_with_a_word(tmp_path, caplog):
    text = "auxiliary_learning_rate: 0.5\nalarms: {lowest_token_entropy: 0.25, patience: 7}\nmethod: {beta: 1}"
    job = load_config(StudentJob, written(tmp_path, text))
    assert (job.method.auxiliary_learning_rate, job.method.lowest_token_entropy, job.method.beta) == (0.5, 0.25, 1)
    assert job.alarms.patience == 7
    assert "auxiliary_learning_rate is called method.auxiliary_learning_rate now" in caplog.text
    job = load_config(StudentJob, written(tmp_path, text), ["method.auxiliary_learning_rate=0.1"])
    assert job.method.auxiliary_learning_rate == 0.1
    assert load_config(StudentJob, overrides=["auxiliary_learning_rate=0.3"]).method.auxiliary_learning_rate == 0.3


def test_every_configuration_that_is_there_is_read():
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        job_class = next((job for name, job in JOBS.items() if path.stem.startswith(name)), StudentJob)
        if path.parent.name != "accelerate":
            assert load_config(job_class, path) != job_class(), path
