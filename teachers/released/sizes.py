"""The sizes of released teachers, for random weights: to prove shapes, memory and speed without a file.

Under `torch.device("meta")` they take no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from teachers.denoiser import Denoiser
from teachers.networks.amused import AmusedDenoiser
from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.maskgit import MaskGITTransformer
from teachers.networks.meissonic import MeissonicTransformer
from teachers.samplers import MaskGITSampler
from teachers.tokenizers.vq import VQTokenizer

NUM_CLASSES = 1000
VQGAN = {
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
}
TAMING = VQGAN | {"num_vq_embeddings": 1024, "latent_channels": 256, "vq_embed_dim": 256}
LLAMAGEN = VQGAN | {"num_vq_embeddings": 16384, "latent_channels": 256, "vq_embed_dim": 8}
AMUSED_VQ = {  # Meissonic's, too
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [128, 256, 256, 512, 768],
    "layers_per_block": 2,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 8192,
    "latent_channels": 64,
    "vq_embed_dim": 64,
}
AMUSED = {"hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 16, "intermediate_size": 2816}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
CLIP_H = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


Sizes = tuple[Denoiser, dict[str, Any]]  # the network, and the other components of its pipeline


def maskgit(side: int) -> Sizes:
    network = MaskGITTransformer(TAMING["num_vq_embeddings"], NUM_CLASSES, (side, side))
    return network, {"tokenizer": tokenizer(side, TAMING), "sampler": MaskGITSampler(8)}


def halton(side: int, hidden_size: int, num_layers: int, num_heads: int, mlp_size: int) -> Sizes:
    network = HaltonMaskGITTransformer(
        LLAMAGEN["num_vq_embeddings"], NUM_CLASSES, (side, side), hidden_size, num_layers, num_heads, mlp_size
    )
    return network, {"tokenizer": tokenizer(side, LLAMAGEN), "sampler": MaskGITSampler(8)}


def amused(side: int, resampling: bool) -> Sizes:
    settings = AMUSED | {"downsample": resampling, "upsample": resampling, "sample_size": side}
    return AmusedDenoiser((side, side), settings), of_text(side, CLIP_L, num_steps=12)


def meissonic(side: int) -> Sizes:
    return MeissonicTransformer((side, side)), of_text(side, CLIP_H, num_steps=64)


def of_text(side: int, text_encoder: dict[str, Any], num_steps: int) -> dict[str, Any]:
    config = CLIPTextConfig(**text_encoder, projection_dim=text_encoder["hidden_size"], hidden_act="gelu")
    return {
        "tokenizer": tokenizer(side, AMUSED_VQ, unit_range=True),
        "sampler": MaskGITSampler(num_steps, schedule="cosine", choice_temperature=2.0),
        "text_encoder": CLIPTextModelWithProjection(config),
    }


def tokenizer(side: int, settings: dict[str, Any], unit_range: bool = False) -> VQTokenizer:
    return VQTokenizer((16 * side, 16 * side), settings, unit_range)


RELEASED: dict[str, Callable[[], Sizes]] = {  # those that need nothing beside themselves
    "maskgit-256": lambda: maskgit(16),
    "maskgit-512": lambda: maskgit(32),
    "halton-tiny-256": lambda: halton(16, 384, 6, 6, 1024),
    "halton-small-256": lambda: halton(16, 512, 12, 6, 1536),
    "halton-base-256": lambda: halton(16, 768, 12, 12, 2048),
    "halton-small-384": lambda: halton(24, 512, 12, 6, 1536),
    "halton-base-384": lambda: halton(24, 768, 12, 12, 2048),
    "halton-large-384": lambda: halton(24, 1024, 24, 16, 2816),
}
OF_TEXT: dict[str, Callable[[], Sizes]] = {
    "amused-256": lambda: amused(16, resampling=False),
    "amused-512": lambda: amused(32, resampling=True),
    "meissonic-1024": lambda: meissonic(64),
}


def random_components(name: str, seed: int = 0) -> dict[str, Any]:
    """What a `MaskedDiffusionPipeline` of a released teacher's sizes is made of, with random weights.

    Of one conditioned on text the text encoder is without its tokenizer: its conditions come encoded.
    """
    torch.manual_seed(seed)
    denoiser, others = (RELEASED | OF_TEXT)[name]()
    components = {"denoiser": denoiser, **others}
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components
