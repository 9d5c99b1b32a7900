"""Every published layout goes the whole way, from its folder to images of an exported student."""

import pytest
import torch
from tiny_published import LAYOUTS

from distill.config import load_config
from distill.jobs.student import StudentJob, load_student, train_student
from distill.methods import METHODS
from students import OneStepPipeline
from students.export import export_student
from students.initialisation import TokenInitialiser
from teachers import MaskedDiffusionPipeline
from teachers.conditions.condition import TextCondition
from teachers.cost import NUM_TEXT_TOKENS, cost_summary, count_operations, forward_flops

PROMPTS = ["a red apple", "a green car", "house"]


@pytest.mark.parametrize("adapter_rank", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_distilled_exported_and_drawn_from(layout, adapter_rank, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    job = load_config(
        StudentJob,
        overrides=[
            f"teacher={folder}", f"output={tmp_path / 'run'}", f"prompts.name={tmp_path / 'prompts.txt'}",
            f"adapter_rank={adapter_rank}", "training.num_steps=2", "training.batch_size=2", "training.tracker=none",
            "training.warmup_steps=0", "training.learning_rate=0.01",
        ],
    )  # fmt: skip
    assert train_student(job)
    student, _, step = load_student(tmp_path / "run")
    assert step == 2
    teacher = MaskedDiffusionPipeline.from_pretrained(folder)
    before = teacher.denoiser.state_dict()
    learnt = {name for name, weights in student.denoiser.state_dict().items() if not torch.equal(weights, before[name])}
    assert any("transformer" in name for name in learnt)
    assert not any("mlm_layer" in name for name in learnt)

    export(student, tmp_path / "one-step")
    exported = OneStepPipeline.from_pretrained(tmp_path / "one-step")
    images = [
        pipeline(PROMPTS, generator=torch.Generator().manual_seed(3), output_type="pt").images
        for pipeline in (student, exported)
    ]
    assert torch.equal(*images)
    assert images[0].shape == (3, 3, *teacher.tokenizer.config.image_size)


def export(student, output):
    card = {"method": METHODS["dimo"], "metadata": {}, "measurements": [], "protocol": ""}
    export_student(student, output, prompts=PROMPTS[:1], **card)


def test_a_student_that_is_not_the_same_when_read_back_is_not_exported(tmp_path, monkeypatch):
    teacher = MaskedDiffusionPipeline.from_pretrained(LAYOUTS["monetico"](tmp_path / "teacher"), image_size=8)
    initialiser = TokenInitialiser.for_teacher(teacher)
    student = OneStepPipeline(
        teacher.denoiser, teacher.tokenizer, initialiser, teacher.text_encoder, teacher.text_tokenizer
    )
    export(student, tmp_path / "whole")
    from_pretrained = OneStepPipeline.from_pretrained

    def other(folder):
        pipeline = from_pretrained(folder)
        pipeline.denoiser.cond_embed.linear_1.weight.data[0, 0] += 1e-6
        return pipeline

    monkeypatch.setattr(OneStepPipeline, "from_pretrained", other)
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export(student, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_its_cost_is_what_a_forward_counts(layout, tmp_path):
    teacher = MaskedDiffusionPipeline.from_pretrained(LAYOUTS[layout](tmp_path / "teacher"))
    condition = TextCondition(torch.zeros(1, NUM_TEXT_TOKENS, 16), torch.zeros(1, 16), torch.zeros(1, 5))
    tokens = torch.zeros(1, teacher.sequence_length, dtype=torch.long)
    with count_operations() as counter:
        teacher.denoiser(tokens, condition)
    assert counter.get_total_flops() == forward_flops(teacher.denoiser) > 0
    assert "GFLOP per image and evaluation" in cost_summary(teacher)
