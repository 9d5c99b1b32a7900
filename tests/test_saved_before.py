"""Pipelines that were saved when a file's name was part of a component's, by the version before files moved."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin, SchedulerMixin
from safetensors.torch import load_file

from students.loading import load_pipeline
from teachers.conditions.condition import TextCondition
from teachers.randomness import sample_generators

SAVED = Path(__file__).parent / "data" / "saved_before"
EXPECTED = load_file(SAVED / "expected.safetensors")
FORMER = ("teachers.network", "teachers.halton_network", "teachers.meissonic_network", "teachers.amused", "teachers.vq")
SAVED_NAMES = {"one_step_mdm.teachers", "one_step_mdm.teachers.samplers", "one_step_mdm.students"}


def images(pipeline):
    fields = ("states", "pooled", "micro_conditions", "null_states", "null_pooled")
    text = {"condition": TextCondition(*(EXPECTED[f"condition.{field}"] for field in fields))}
    given = text if pipeline.condition_kind == "text" else {"class_labels": [3, 7]}
    return pipeline(generator=sample_generators(0, places=range(2)), output_type="pt", **given).images


def names(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {entry[0] for entry in index.values() if isinstance(entry, list) and entry[0]}


def test_every_component_is_saved_under_a_name_that_no_file_s_move_changes():
    found = [part for base in (ModelMixin, SchedulerMixin) for part in subclasses(base)]
    ours = [part for part in found if part.__module__.startswith("one_step_mdm.")]
    ours = [part for part in ours if part.__name__ not in ("Sampler", "ScheduledSampler", "AdaptiveSampler")]
    assert len(ours) == 15
    for part in ours:
        assert part.__module__ in SAVED_NAMES
        assert getattr(importlib.import_module(part.__module__), part.__name__) is part


def subclasses(base):
    return [part for child in base.__subclasses__() for part in (child, *subclasses(child))]


@pytest.mark.parametrize("name", ["maskgit", "halton", "meissonic", "amused", "student"])
def test_they_open_and_give_the_same_images(name, tmp_path):
    assert names(SAVED / name) & set(FORMER)
    shutil.copytree(SAVED / name, tmp_path / "copy")
    pipeline = load_pipeline(tmp_path / "copy")
    torch.testing.assert_close(images(pipeline), EXPECTED[name], atol=1e-5, rtol=0)

    pipeline.save_pretrained(tmp_path / "again")  # under names that no file's move changes
    assert names(tmp_path / "again") <= SAVED_NAMES
    torch.testing.assert_close(images(load_pipeline(tmp_path / "again")), EXPECTED[name], atol=1e-5, rtol=0)
