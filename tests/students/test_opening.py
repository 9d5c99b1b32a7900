"""Folders that are opened, by us and by diffusers itself, and saved again."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_text import amused_folder

from distill.methods.dimo import DiMO
from students import OneStepPipeline, TokenInitialiser
from students.export import export_student
from students.loading import load_pipeline
from teachers import MaskedDiffusionPipeline

ROOT = Path(__file__).parents[2]
WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
BY_DIFFUSERS = """
import json, sys, torch
from diffusers import DiffusionPipeline

found = []
for name in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline="pipeline", trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    found.append([type(pipeline).__name__, pipeline([3], generator=generator, output_type="tokens").tokens[0].tolist()])
print(json.dumps(found))
exec(sys.argv[1])  # what the card says
"""


@pytest.fixture
def one_step(teacher, tmp_path):
    """A folder that was exported."""
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    about = {"method": DiMO, "metadata": {"seed": "5"}, "measurements": [{"fd": 1.5}], "protocol": "By hand."}
    export_student(student, tmp_path / "one-step", **about)
    return tmp_path / "one-step"


def tokens(pipeline):
    return pipeline([3], generator=torch.Generator().manual_seed(0), output_type="tokens").tokens[0].tolist()


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_process_that_has_imported_nothing_of_ours_opens_folders_by_diffusers(one_step, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    our_way, diffusers_way = re.findall(r"```python\n(.*?)```", (one_step / "README.md").read_text(), re.DOTALL)
    line = [sys.executable, "-c", BY_DIFFUSERS, diffusers_way + our_way, "one-step", str(tmp_path / "teacher")]
    ran = subprocess.run(line, cwd=tmp_path, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    student = OneStepPipeline.from_pretrained(one_step)
    expected = [["OneStepPipeline", tokens(student)], ["MaskedDiffusionPipeline", tokens(teacher)]]
    assert json.loads(ran.stdout) == expected


def test_what_an_export_says_of_itself_stays_when_it_is_saved_again(one_step, tmp_path):
    OneStepPipeline.from_pretrained(one_step).save_pretrained(tmp_path / "again", variant="fp16")
    load_pipeline(tmp_path / "again", variant="fp16").save_pretrained(tmp_path / "again" / "and" / "again")
    last = tmp_path / "again" / "and" / "again"
    for path in one_step.rglob("*.*"):
        if path.suffix == ".safetensors":
            assert metadata(path) == metadata(last / path.relative_to(one_step))
        else:
            assert path.read_bytes() == (last / path.relative_to(one_step)).read_bytes(), path
    assert metadata(last / WEIGHTS)["seed"] == "5"


def test_what_an_export_says_is_not_said_of_other_weights(one_step, tmp_path, caplog):
    """Precision and settings do not make them others; of what was changed the licence stays."""
    (one_step / "LICENSE").write_text("as you like")
    student = OneStepPipeline.from_pretrained(one_step, torch_dtype=torch.bfloat16, temperature=0.5)
    student.save_pretrained(tmp_path / "half")
    assert metadata(tmp_path / "half" / WEIGHTS)["seed"] == "5"
    assert (tmp_path / "half" / "README.md").is_file()
    assert not caplog.records
    student = OneStepPipeline.from_pretrained(one_step)
    with torch.no_grad():
        next(student.denoiser.parameters()).view(-1)[-1] += 1e-3
    student.save_pretrained(tmp_path / "tuned")
    assert len(caplog.records) == 1
    assert "seed" not in metadata(tmp_path / "tuned" / WEIGHTS)
    left_out = {path.name for path in one_step.iterdir()} - {path.name for path in (tmp_path / "tuned").iterdir()}
    assert left_out == {"README.md", "samples.png", "measurements.json"}


@pytest.mark.parametrize("name", ["cat`<script>", "a\n# b\x1b[2J", "*x* [y](z) |", "&lt;b"])
def test_names_that_others_wrote_are_text_in_the_card(name, teacher, tmp_path, monkeypatch):
    names = {str(label): f"{name} {label}" for label in range(10)}
    student = OneStepPipeline(
        teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher), class_names=names
    )
    about = {"method": DiMO, "metadata": {}, "measurements": [], "protocol": ""}
    write_text, encodings = Path.write_text, []

    def noted(path, text, encoding=None, **settings):
        if path.name in ("README.md", "measurements.json"):
            encodings.append(encoding)
        return write_text(path, text, encoding=encoding, **settings)

    monkeypatch.setattr(Path, "write_text", noted)
    export_student(student, tmp_path / "named", **about)
    assert encodings == ["utf-8", "utf-8"]
    (line,) = re.findall("^The columns: (.*)$", (tmp_path / "named" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert not re.search(r"[<>`*|\[\]\x00-\x1f]|&(?!#\d+;)|(?<!&)#", line)
    assert html.unescape(line).split("; ")[3] == re.sub(r"[\x00-\x1f]", " ", f"{name} 3")


def test_diffusers_own_words_are_taken(one_step):
    student = OneStepPipeline.from_pretrained(pretrained_model_name_or_path=one_step, trust_remote_code=True)
    assert tokens(student) == tokens(load_pipeline(one_step, trust_remote_code=True))


def test_what_a_folder_says_already_is_not_replaced(one_step, tmp_path):
    student = OneStepPipeline.from_pretrained(one_step)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("of my own")
    student.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "of my own"
    student.register_to_config(temperature=2.0)
    student.save_pretrained(one_step)  # where it was opened from
    assert OneStepPipeline.from_pretrained(one_step).config.temperature == 2.0
    assert metadata(one_step / WEIGHTS)["seed"] == "5"


def test_a_pipeline_of_another_kind_is_named(one_step, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    amused_folder(tmp_path / "amused")
    cases = [
        (OneStepPipeline, tmp_path / "teacher", "MaskedDiffusionPipeline"),
        (MaskedDiffusionPipeline, one_step, "OneStepPipeline"),
        (OneStepPipeline, tmp_path / "amused", "AmusedPipeline"),
    ]
    for kind, folder, right in cases:
        with pytest.raises(ValueError, match=rf"holds a {right}, no {kind.__name__}: open it with {right}\.from_"):
            kind.from_pretrained(folder)

    class Own(OneStepPipeline):
        pass

    assert isinstance(Own.from_pretrained(one_step), Own)


@pytest.mark.parametrize("content", ["{", "[1]", '{"_class_name": "OneStepPipeline"}', "{}", '{"a": ' * 5000])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model_index\.json|holds a None"):
        OneStepPipeline.from_pretrained(tmp_path)


def test_where_nothing_is_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one-step", "runs/digits/one-step", str(tmp_path / "one-step"), "me/one-step"):
        for opened in (load_pipeline, OneStepPipeline.from_pretrained, MaskedDiffusionPipeline.from_pretrained):
            with pytest.raises(FileNotFoundError, match=f"there is no folder {name}; ") as found:
                opened(name, local_files_only=True)
            assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_of_diffusers_names_of_the_precision_are_taken(one_step, name):
    student = OneStepPipeline.from_pretrained(one_step, **{name: torch.bfloat16})
    assert student.denoiser.dtype == student.tokenizer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torch_dtype='bf16'"):
        OneStepPipeline.from_pretrained(one_step, **{name: "bf16"})


def test_weights_of_a_variant_are_its_own_and_else_the_plain_ones(one_step, tmp_path):
    student = OneStepPipeline.from_pretrained(one_step)
    with pytest.raises(ValueError, match="no weights of variant='ema'"):
        OneStepPipeline.from_pretrained(one_step, variant="ema")
    with torch.no_grad():
        student.denoiser.output_bias[..., 15] += 100  # the last entry of the codebook is all that is drawn
    student.save_pretrained(tmp_path / "ema", variant="ema")
    for path in tmp_path.glob("ema/denoiser/*.safetensors"):
        path.rename(one_step / "denoiser" / path.name)
    assert set(tokens(load_pipeline(one_step, variant="ema"))) == {15}
    assert set(tokens(load_pipeline(one_step))) != {15}


def test_settings_and_parts_that_are_given_go_before_those_of_the_folder(one_step, tmp_path):
    student = OneStepPipeline.from_pretrained(one_step, temperature=0.5)
    assert student.config.temperature == 0.5
    (one_step / WEIGHTS).unlink()
    again = load_pipeline(tmp_path, subfolder="one-step", denoiser=student.denoiser)
    assert again.denoiser is student.denoiser
    with pytest.raises(ValueError, match="safetensors alone"):
        OneStepPipeline.from_pretrained(one_step, use_safetensors=False)
    with pytest.raises(ValueError, match="safetensors alone"):
        student.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    with pytest.raises(TypeError, match="safety_checker"):
        OneStepPipeline.from_pretrained(one_step, denoiser=student.denoiser, safety_checker=None)
