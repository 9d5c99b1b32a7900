"""Pipelines that were saved when a file's name was part of a component's, by the version before files moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from students.loading import load_pipeline
from teachers.conditions.condition import TextCondition
from teachers.randomness import sample_generators

SAVED = Path(__file__).parent / "data" / "saved_before"
EXPECTED = load_file(SAVED / "expected.safetensors")
FORMER = ("teachers.network", "teachers.halton_network", "teachers.meissonic_network", "teachers.amused", "teachers.vq")


def images(pipeline):
    fields = ("states", "pooled", "micro_conditions", "null_states", "null_pooled")
    text = {"condition": TextCondition(*(EXPECTED[f"condition.{field}"] for field in fields))}
    given = text if pipeline.condition_kind == "text" else {"class_labels": [3, 7]}
    return pipeline(generator=sample_generators(0, places=range(2)), output_type="pt", **given).images


def names(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {entry[0] for entry in index.values() if isinstance(entry, list) and entry[0]}


@pytest.mark.parametrize("name", ["maskgit", "halton", "meissonic", "amused", "student"])
def test_they_open_and_give_the_same_images(name, tmp_path):
    assert names(SAVED / name) & set(FORMER)
    shutil.copytree(SAVED / name, tmp_path / "copy")
    pipeline = load_pipeline(tmp_path / "copy")
    torch.testing.assert_close(images(pipeline), EXPECTED[name], atol=1e-5, rtol=0)

    pipeline.save_pretrained(tmp_path / "again")  # under names that no file's move changes
    assert names(tmp_path / "again") <= {"teachers", "teachers.samplers", "students"}
    torch.testing.assert_close(images(load_pipeline(tmp_path / "again")), EXPECTED[name], atol=1e-5, rtol=0)
