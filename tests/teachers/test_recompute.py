"""Gradient checkpointing of every network: the same gradients, each layer computed twice."""

import pytest
import torch
from tiny_text import amused_folder

from distill.student_job import make_learner
from teachers import MaskedDiffusionPipeline, MaskGITTransformer
from teachers.condition import ClassCondition, TextCondition
from teachers.halton_network import HaltonMaskGITTransformer
from teachers.meissonic_network import MeissonicTransformer

SIZES = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "mlp_size": 32}
MEISSONIC = {
    "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "codebook_size": 24,
    "vocab_size": 32,
}  # fmt: skip


def classes():
    return ClassCondition(torch.tensor([3, 7]))


def text():
    return TextCondition(torch.randn(2, 5, 16), torch.randn(2, 16), torch.randn(2, 5))


def amused(tmp_path):
    amused_folder(tmp_path / "amused")
    teacher = MaskedDiffusionPipeline.from_pretrained(tmp_path / "amused")
    return teacher.denoiser, teacher.encode_condition(["house", "a car"])


NETWORKS = {
    "maskgit": lambda path: (MaskGITTransformer(24, 10, (4, 4), **SIZES), classes()),
    "halton": lambda path: (HaltonMaskGITTransformer(24, 10, (4, 4), **SIZES), classes()),
    "meissonic": lambda path: (MeissonicTransformer((4, 4), **MEISSONIC), text()),
    "amused": amused,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_activations_give_the_same_gradients(name, tmp_path):
    torch.manual_seed(0)
    teacher, condition = NETWORKS[name](tmp_path)
    with torch.no_grad():  # some layers start as the identity, through which no gradient goes
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(0, 24, (2, 16))
    gradients, calls = [], []
    for gradient_checkpointing in (False, True):
        learner = make_learner(teacher, False, gradient_checkpointing)
        for layer in learner.layers:
            next(layer.children()).register_forward_hook(lambda *call: calls.append(call))
        learner(tokens, condition).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in learner.named_parameters()})
    assert len(calls) == 3 * len(learner.layers)
    plain, recomputed = gradients
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[key], msg=key)
