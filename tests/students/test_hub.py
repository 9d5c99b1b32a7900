"""Pipelines sent to a hub and opened from it by others: a server on this machine, and processes that ask it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_teacher
from hub_server import TOKEN, running_hub

from distill.methods.dimo import DiMO
from students import OneStepPipeline, TokenInitialiser
from students.export import export_student
from students.loading import load_pipeline

ROOT = Path(__file__).parents[2]
CALL = """
import json, sys, torch

def tokens(pipeline):
    return pipeline([3], generator=torch.Generator().manual_seed(0), output_type="tokens").tokens[0].tolist()

def refusal(call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except FileNotFoundError as error:
        return str(error)

TOKEN, FOLDER, FIRST = sys.argv[1:]
"""
PUSH = """
from students.loading import load_pipeline
one_step = load_pipeline(FOLDER + "/one-step")
one_step.push_to_hub("me/one-step", token=TOKEN)
one_step.register_to_config(temperature=2.0)
one_step.save_pretrained(FOLDER + "/hot", push_to_hub=True, repo_id="me/one-step", token=TOKEN)
one_step.push_to_hub("me/secret", token=TOKEN, private=True, variant="fp16")
teacher = load_pipeline(FOLDER + "/teacher")
teacher.push_to_hub("me/models", token=TOKEN, subfolder="teachers/v1.5")
"""
OPEN = """
from diffusers import DiffusionPipeline
by_diffusers = DiffusionPipeline.from_pretrained("me/one-step", custom_pipeline="pipeline", trust_remote_code=True)
from students import OneStepPipeline
from students.loading import load_pipeline
from teachers import MaskedDiffusionPipeline, PatchTokenizer
tokenizer = PatchTokenizer.from_pretrained(FOLDER + "/teacher/tokenizer")
in_models = {"subfolder": "teachers/v1.5", "tokenizer": tokenizer}
print(json.dumps({
    "by diffusers": tokens(by_diffusers),
    "newest": tokens(OneStepPipeline.from_pretrained("me/one-step")),
    "pinned": tokens(load_pipeline("me/one-step", revision=FIRST)),
    "kept": tokens(load_pipeline("me/one-step", revision=FIRST, local_files_only=True)),
    "private": tokens(OneStepPipeline.from_pretrained("me/secret", token=TOKEN, variant="fp16")),
    "teacher": tokens(MaskedDiffusionPipeline.from_pretrained("me/models", **in_models)),
    "refused": [
        refusal(load_pipeline, "me/secret", cache_dir=FOLDER + "/other"),
        refusal(load_pipeline, "me/nothing"),
        refusal(load_pipeline, "me/one-step", revision="v2"),
        refusal(load_pipeline, "me/models"),
        refusal(load_pipeline, "somewhere/on/a/disk"),
        refusal(load_pipeline, "me/nothing", local_files_only=True),
    ],
}))
"""


def call(hub, folder, code, first=""):
    """Runs code in a process of its own that knows this hub; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    line = [sys.executable, "-c", CALL + code, TOKEN, str(folder), first]
    return subprocess.run(line, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


@pytest.fixture(scope="module")
def hub_and_folder(digits, tmp_path_factory):
    """A hub with a student of two commits, a private one and a teacher; and a folder with both as they were saved."""
    folder = tmp_path_factory.mktemp("hub")
    teacher = tiny_teacher(digits)
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    about = {"method": DiMO, "metadata": {"seed": "5"}, "measurements": [{"fd": 1.5}], "protocol": "By hand."}
    export_student(student, folder / "one-step", **about)
    teacher.save_pretrained(folder / "teacher")
    with running_hub() as hub:
        call(hub, folder, PUSH)
        yield hub, folder


def tokens(pipeline):
    return pipeline([3], generator=torch.Generator().manual_seed(0), output_type="tokens").tokens[0].tolist()


def test_what_is_pushed_is_the_folder_with_its_card(hub_and_folder):
    hub, folder = hub_and_folder
    files, _ = hub.repositories["me/one-step"].commits.values()
    one_step = folder / "one-step"
    here = {path.relative_to(one_step).as_posix(): path.read_bytes() for path in one_step.rglob("*") if path.is_file()}
    assert files.keys() == here.keys()
    changed = {name for name, content in files.items() if content != here[name]}
    assert all(name.endswith(".safetensors") for name in changed)  # whose metadata has no order
    for name in [name for name in here if name.endswith(".safetensors")]:
        assert header(files[name]) == header(here[name])
        assert files[name][-64:] == here[name][-64:]
    assert header(files["denoiser/diffusion_pytorch_model.safetensors"])["__metadata__"]["seed"] == "5"
    assert hub.repositories["me/secret"].private


def header(content):
    """What a safetensors file says of its tensors and itself."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_it_opens_by_its_id_as_the_folder_does(hub_and_folder):
    hub, folder = hub_and_folder
    (first, *_) = hub.repositories["me/one-step"].commits
    (files,) = hub.repositories["me/models"].commits.values()
    for name in ("denoiser/pytorch_model.bin", "denoiser/diffusion_pytorch_model.fp16.safetensors", "x.safetensors"):
        files[f"teachers/v1.5/{name}"] = b"not asked for"
    opened = json.loads(call(hub, folder, OPEN, first))
    refused = opened.pop("refused")

    student, teacher = load_pipeline(folder / "one-step"), load_pipeline(folder / "teacher")
    pinned = tokens(student)
    student.register_to_config(temperature=2.0)
    newest = tokens(student)
    assert pinned != newest
    expected = {"by diffusers": newest, "newest": newest, "pinned": pinned, "kept": pinned, "private": newest}
    assert opened == expected | {"teacher": tokens(teacher)}

    reasons = ["private one needs token", "no repository", "no such revision", "no model_index.json", "owner/name"]
    for line, reason in zip(refused, [*reasons, "nothing of that name is in its cache"], strict=True):
        assert reason in line
        assert len(line.splitlines()) == 1

    fetched = {file.removeprefix("teachers/v1.5/") for name, file in hub.downloads if name == "me/models"}
    weights = "denoiser/diffusion_pytorch_model.safetensors"  # and none of the code, nor the tokenizer, which was given
    assert fetched == {"model_index.json", "denoiser/config.json", weights, "sampler/scheduler_config.json"}
