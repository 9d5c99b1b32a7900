"""A tiny teacher in each layout that is published."""

import json
from functools import partial

import torch
from tiny_text import amused_folder, tiny_text_encoder, tiny_vq

from teachers.networks.meissonic import MeissonicTransformer

MEISSONIC = {
    "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "codebook_size": 24,
    "vocab_size": 32,
}  # fmt: skip


def meissonic_folder(path, resampling):
    """The layout of the released folders, whose classes are not diffusers' own."""
    text_encoder, tokenizer = tiny_text_encoder()
    torch.manual_seed(0)
    transformer = MeissonicTransformer((4, 4), **MEISSONIC, downsample=resampling, upsample=resampling)
    transformer.save_pretrained(path / "transformer")
    config = json.loads((path / "transformer" / "config.json").read_text())
    del config["token_grid"], config["timestep"]
    config |= {"_class_name": "Transformer2DModel", "patch_size": 1, "in_channels": 64, "guidance_embeds": False}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    tiny_vq().save_pretrained(path / "vqvae")
    text_encoder.save_pretrained(path / "text_encoder")
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    index = {
        "_class_name": "Pipeline",
        "scheduler": ["scheduler", "Scheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["transformer", "Transformer2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


LAYOUTS = {
    "amused-256": partial(amused_folder, resampling=False),
    "amused-512": partial(amused_folder, resampling=True),
    "meissonic": partial(meissonic_folder, resampling=True),
    "monetico": partial(meissonic_folder, resampling=False),
}
