"""Every network, tiny and untrained, with a condition of two samples: 4x4 tokens of 24."""

import torch
from tiny_text import amused_folder

from teachers import MaskedDiffusionPipeline, MaskGITTransformer
from teachers.conditions.condition import ClassCondition, TextCondition
from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.meissonic import MeissonicTransformer

SIZES = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "mlp_size": 32}
MEISSONIC = {
    "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "codebook_size": 24,
    "vocab_size": 32,
}  # fmt: skip


def classes():
    return ClassCondition(torch.tensor([3, 7]))


def text():
    return TextCondition(*(torch.randn(2, *shape) for shape in [(5, 16), (16,), (5,), (5, 16), (16,)]))


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
