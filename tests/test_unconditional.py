"""No condition at all: a flat folder of images without labels, from the teacher to the exported student."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from students import OneStepPipeline, TokenInitialiser
from students.initialisation import teacher_marginals
from teachers import MaskedDiffusionPipeline, MaskGITSampler, MaskGITTransformer, PatchTokenizer
from teachers.pipeline import all_classes
from teachers.randomness import sample_generators

TRAINING = "training={num_steps: 4, batch_size: 8, tracker: none}"
NETWORK = "network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}"


@pytest.fixture
def unconditional(digits):
    tokenizer = PatchTokenizer.fit(digits, patch_size=2, codebook_size=16)
    torch.manual_seed(0)
    denoiser = MaskGITTransformer(16, 0, (4, 4), hidden_size=16, num_layers=1, num_attention_heads=2, mlp_size=32)
    return MaskedDiffusionPipeline(denoiser.eval(), tokenizer, MaskGITSampler(4, order="random"))


def test_from_a_flat_folder_to_an_exported_student(digits, command):
    Path("images").mkdir()
    for number, image in enumerate(digits[:60, 0]):
        PIL.Image.fromarray((255 * image).byte().numpy()).save(f"images/{number}.png")
    teacher = ["data.name=images", "tokenizer.codebook_size=16", NETWORK, TRAINING, "output=teacher"]
    status, _, errors = command("train_teacher.py", *teacher)
    assert status == 2
    assert "no column 'label'; it has image; images without labels are read with label_column=" in errors
    status, _, errors = command("train_teacher.py", *teacher, "data.label_column=")
    assert status == 0, errors
    pipeline = MaskedDiffusionPipeline.from_pretrained("teacher/pipeline")
    assert pipeline.condition_kind == "none"
    assert Path("teacher/samples/step-000004.png").exists()

    student = ["teacher=teacher/pipeline", "monitor.name=images", "monitor.label_column=", TRAINING]
    status, _, errors = command("train_student.py", *student, "output=guided", "method.guidance_scale=2")
    assert status == 2
    assert "guidance_scale=2.0 leads towards a condition, and this model has none" in errors
    assert not Path("guided").exists()
    status, _, errors = command("train_student.py", *student, "output=run")
    assert status == 0, errors

    assert command("export.py", "run", "--output", "one")[0] == 0
    assert "pipe(batch_size=4)" in Path("one/README.md").read_text()
    assert command("sample.py", "one", "--output", "grid.png", "--num-rows", 2)[0] == 0
    assert PIL.Image.open("grid.png").size == (10 * 34, 2 * 34)
    assert command("sample.py", "one", "--output", "grid.png", "--class-labels", 3)[0] == 2
    for folder in ("one", "teacher/pipeline"):  # real digits have labels, these images have none to be true to
        status, last, errors = command("evaluate.py", folder, "--num-images", 100, "--classifier", "classifier")
        assert status == 0, errors
        assert "fd" in json.loads(last)
        assert "class_consistency" not in json.loads(last)


def test_it_is_asked_for_a_number_of_images(unconditional):
    assert len(unconditional().images) == 1
    assert len(unconditional(batch_size=3).images) == 3
    whole = unconditional(batch_size=3, generator=sample_generators(0, places=range(3)), output_type="pt").images
    condition = unconditional.encode_condition([None])
    alone = unconditional(condition=condition, generator=sample_generators(0, places=[2]), output_type="pt").images
    assert torch.equal(whole[2:], alone)
    for wrong in ({"batch_size": 0}, {"negative_prompt": "blurry"}):
        with pytest.raises(ValueError, match="takes no prompt"):
            unconditional(**wrong)
    for wrong in ([3], "a cat"):
        with pytest.raises(ValueError, match="unconditional"):
            unconditional(wrong)


def test_labels_are_asked_for_where_there_are_classes(teacher):
    with pytest.raises(ValueError, match="pass one of prompt, class_labels and condition"):
        teacher(batch_size=3)
    with pytest.raises(ValueError, match="batch_size is of unconditional models"):
        teacher([3], batch_size=3)


def test_guidance_is_refused(unconditional):
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5"):
        unconditional(guidance_scale=1.5)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="this model has none"):
        unconditional.denoise(tokens, unconditional.encode_condition([None]), guidance_scale=2.0)


def test_random_tokens_are_of_the_one_marginal(unconditional):
    initialiser = TokenInitialiser.for_teacher(unconditional, "marginal", mask_ratio=(0.0, 0.0))
    (marginal,) = teacher_marginals(unconditional, all_classes(unconditional))
    assert marginal.shape == (1, 16, 16)
    condition = unconditional.encode_condition([None] * 20_000)
    tokens = initialiser.random_tokens(condition, torch.Generator().manual_seed(0))
    found = torch.nn.functional.one_hot(tokens, 16).float().mean(0)
    assert (found - marginal[0]).abs().max() < 0.02
    student = OneStepPipeline(unconditional.denoiser, unconditional.tokenizer, initialiser)
    assert student(batch_size=2).nfe == 1
