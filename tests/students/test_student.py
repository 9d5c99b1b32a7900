import json

import pytest
import torch
from safetensors import safe_open

from distill.methods.dimo import DiMO
from students import OneStepPipeline, TokenInitialiser, export
from students.loading import load_pipeline
from teachers import folder
from teachers.randomness import sample_generators


@pytest.fixture
def student(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, "marginal", embedding_noise=0.1)
    return OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser, temperature=0.8)


METADATA = {"settings": json.dumps({"beta": 0.0}), "teacher": "here"}


def write(student, output, measurements=()):
    export.export_student(
        student, output, method=DiMO, metadata=METADATA, measurements=list(measurements), protocol="Measured by hand."
    )


def test_one_evaluation_makes_the_images(student):
    calls = []
    student.denoiser.register_forward_hook(lambda module, inputs, logits: calls.append(logits.shape))
    output = student(class_labels=[3, 7], generator=torch.Generator().manual_seed(0), output_type="pt")
    assert calls == [(2, 16, 16)]
    assert output.nfe == 1
    assert output.images.shape == (2, 1, 8, 8)
    assert (output.tokens < student.codebook_size).all()


def test_it_is_called_like_a_teacher_of_one_step(student):
    plain = student([3, 7], generator=torch.Generator().manual_seed(0)).tokens
    like = student([3, 7], num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).tokens
    assert torch.equal(plain, like)
    for asked, message in [
        ({"num_inference_steps": 8}, "num_inference_steps=8: a one-step student takes one step"),
        ({"guidance_scale": 2.0}, "guidance is distilled into"),
        ({"negative_prompt": "blurry"}, "negative_prompt is for teachers"),
        ({"callback_on_step_end": print}, "callback_on_step_end is for teachers"),
        ({"negative_prompt_embeds": torch.zeros(1, 16)}, "negative_prompt_embeds is for teachers"),
    ]:
        with pytest.raises(ValueError, match=message):
            student([3, 7], **asked)
    with pytest.raises(TypeError, match="heigth"):
        student([3, 7], heigth=8)


def test_an_image_does_not_depend_on_its_batch(student):
    whole = student([1, 2, 3], generator=sample_generators(0, places=range(3)), output_type="tokens").tokens
    alone = student([3], generator=sample_generators(0, places=[2]), output_type="tokens").tokens
    assert torch.equal(whole[2:], alone)


def test_the_exported_student_is_the_student(student, tmp_path):
    write(student, tmp_path / "one-step", [{"": "student", "fd": 1.23456}])
    loaded = load_pipeline(tmp_path / "one-step")
    assert isinstance(loaded, OneStepPipeline)
    assert loaded.config.temperature == 0.8
    images = [
        pipe([0, 9], generator=torch.Generator().manual_seed(0), output_type="pt").images for pipe in (student, loaded)
    ]
    assert torch.equal(*images)


def test_the_export_says_where_it_comes_from(student, tmp_path):
    write(student, tmp_path / "one-step", [{"": "student", "fd": 1.23456}])
    with safe_open(tmp_path / "one-step" / "denoiser" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert METADATA.items() <= file.metadata().items()
    card = (tmp_path / "one-step" / "README.md").read_text()
    assert "1.235" in card
    assert DiMO.citation in card
    assert DiMO.url in card
    assert "Measured by hand." in card
    assert (tmp_path / "one-step" / "samples.png").stat().st_size > 1000


def test_nothing_is_overwritten(student, tmp_path):
    (tmp_path / "one-step").mkdir()
    (tmp_path / "one-step" / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        write(student, tmp_path / "one-step")
    assert [path.name for path in tmp_path.rglob("*")] == ["one-step", "precious"]


def test_an_export_that_reads_back_differently_is_refused(student, tmp_path, monkeypatch):
    def damage(tensors, path, metadata):
        tensors = {key: tensor + 1e-3 for key, tensor in tensors.items()}
        save_file(tensors, path, metadata=metadata)

    save_file = folder.save_file
    monkeypatch.setattr(folder, "save_file", damage)
    with pytest.raises(RuntimeError, match="same logits"):
        write(student, tmp_path / "one-step")
    assert not (tmp_path / "one-step").exists()


def test_folders_that_hold_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        load_pipeline(tmp_path)
