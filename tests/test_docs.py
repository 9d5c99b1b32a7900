"""What the docs tell their readers to type: every command is one, and those for one's own images do what they say."""

import argparse
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from commands_in_docs import DOCS, ROOT, blocks, commands_in, parse, section, spans

from distill.config import load_config
from distill.jobs.student import StudentJob
from distill.loop.config import TrainingConfig
from eval import classifier, monitor
from students import OneStepPipeline
from teachers.conditions.prompts import PromptConfig
from teachers.data import DataConfig

GUIDE = (ROOT / "docs" / "guide.md").read_text()
TRAINING = [path.name for path in (ROOT / "scripts").glob("train_*.py")]
# What the `key=value` of other scripts are settings of, by the name of the argument.
SETTINGS = {
    ("evaluate.py", "data"): DataConfig,
    ("cache_tokens.py", "data"): DataConfig,
    ("evaluate_text.py", "captions"): PromptConfig,
    ("evaluate_text.py", "real_images"): DataConfig,
    ("benchmark.py", "data"): DataConfig,
    ("benchmark.py", "prompts"): PromptConfig,
    ("benchmark.py", "settings"): TrainingConfig,
    ("quickstart.py", "overrides"): StudentJob,
}
TINY_TRAINING = ["training.num_steps=2", "training.batch_size=4", "training.warmup_steps=1", "training.tracker=none"]
TINY_NETWORK = ["network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}"]
TINY = {"train_teacher.py": TINY_TRAINING + TINY_NETWORK, "train_student.py": TINY_TRAINING}


class ParsedError(BaseException):
    """In place of what a script would do with the arguments that it has read."""

    def __init__(self, parser, arguments):
        super().__init__()
        self.parser, self.arguments = parser, arguments


def read_arguments(script, arguments=None):
    """A script's parser, and what it makes of the arguments; None: it is not asked."""

    def read(original, parser):
        raise ParsedError(parser, None if arguments is None else original(parser))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [script, *(arguments or [])])
        for name in ("parse_args", "parse_intermixed_args"):
            reading = partial(read, getattr(argparse.ArgumentParser, name))
            patched.setattr(argparse.ArgumentParser, name, lambda parser, reading=reading: reading(parser))
        with pytest.raises(ParsedError) as stopped:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return stopped.value.parser, stopped.value.arguments


def options_of(parser):
    """All options of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from options_of(choice)


@pytest.fixture
def checkout(tmp_path):
    """A folder in which the paths of the docs lead somewhere, but for those of runs; nothing is written to the real."""
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page, command, checkout):
    text = page.read_text()
    commands = [shown for block in blocks(text) for shown in commands_in(block)]
    commands += [shown for span in spans(text) if (shown := parse(" ".join(span.split()), is_part=True))]
    for shown in commands:
        assert (ROOT / "scripts" / shown.script).is_file(), shown
        if shown.launcher[:2] == ("accelerate", "launch"):
            given = launch_command_parser().parse_args([*shown.launcher[2:], *shown.arguments])
            assert given.config_file is None or Path(given.config_file).is_file(), shown
        if shown.script in TRAINING:
            status, _, errors = command(shown.script, *shown.arguments, "--dry-run")
            assert status == 0, (shown, errors)
        elif shown.is_part:
            parser, _ = read_arguments(shown.script)
            given = {word.partition("=")[0] for word in shown.arguments if word.startswith("--")}
            assert given <= set(options_of(parser)), shown
        else:
            _, given = read_arguments(shown.script, shown.arguments)
            for name, value in vars(given).items():
                if (settings := SETTINGS.get((shown.script, name))) is not None:
                    load_config(settings, overrides=value or [])


def test_a_wrong_command_would_be_found(command, checkout):
    """The test of the pages against pages with mistakes."""
    for line in (
        "python scripts/train_students.py",
        "python scripts/evaluate.py DIR --number-of-images 5",
        "python scripts/evaluate.py DIR imagesize=5",
        "accelerate launch --processes 2 scripts/train_student.py ...",
        "accelerate launch scripts/train_student.py training.steps=5",
        "one-step-mdm sample DIR --output",
        "python scripts/benchmark.py frontier ... --sampler PUNT",
    ):
        page = checkout / "page.md"
        page.write_text(f"```\n{line}\n```\n")
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            test_every_command_of_a_page_is_one(page, command, checkout)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_file_and_target_of_a_page_is_there(page):
    code = [*blocks(page.read_text()), *spans(page.read_text())]
    files = {file for part in code for file in re.findall(r"(?<![\w/])(?:scripts|configs|tests)/[\w/]+\.\w+", part)}
    assert not [file for file in files if not (ROOT / file).is_file()]
    targets = {target for part in code for target in re.findall(r"^(?:.*&& )?make ([\w-]+)", part, re.MULTILINE)}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


OWN_DATA = [commands_in(block) for block in blocks(section(GUIDE, "Your own data")) if "path/to/images" in block]


@pytest.mark.parametrize("labelled", [True, False])
def test_ones_own_images_in_colour_become_a_grid_of_samples(labelled, command, checkout, monkeypatch):
    """The commands of "Your own data" as they are printed, on networks that are tiny."""
    monkeypatch.setattr(monitor, "NUM_IMAGES", 20)
    monkeypatch.setattr(classifier, "train_classifier", partial(classifier.train_classifier, num_steps=2))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 18, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = checkout / "path/to/images" / (("cat", "dog", "bird")[number % 3] if labelled else "")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(folder / f"{number}.png")
    first, *others = OWN_DATA
    (without,) = [block for block in others if any("data.label_column=" in shown.arguments for shown in block)]
    to_grid = [shown for shown in first if shown.script in ("export.py", "sample.py")]
    assert [shown.script for shown in to_grid] == ["export.py", "sample.py"]
    for shown in first if labelled else [*without, *to_grid]:
        AcceleratorState._reset_state(reset_partial_state=True)
        status, _, errors = command(shown.script, *shown.arguments, *TINY.get(shown.script, []))
        assert status == 0, (shown, errors)
    columns = 3 if labelled else 10
    with PIL.Image.open("grid.png") as grid:
        assert grid.size == (34 * columns, 34 * 8)
        assert np.asarray(grid).std(2).max() > 0  # in colour
    metrics = [json.loads(line) for line in Path("runs/mine/student/metrics.jsonl").read_text().splitlines()]
    assert any("fd" in line for line in metrics) == labelled
    names = OneStepPipeline.from_pretrained("runs/mine/one-step").class_names
    assert names == (["bird", "cat", "dog"] if labelled else None)
