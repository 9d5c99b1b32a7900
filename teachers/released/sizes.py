"""The sizes of released teachers, for random weights: to prove shapes, memory and speed without a file."""

from __future__ import annotations

from typing import Any

import torch

from teachers.networks.halton import HaltonMaskGITTransformer
from teachers.networks.maskgit import MaskGITTransformer
from teachers.samplers import MaskGITSampler
from teachers.tokenizers.vq import VQTokenizer

NUM_CLASSES = 1000
TAMING = {"codebook_size": 1024, "latent_channels": 256, "entry_size": 256}
LLAMAGEN = {"codebook_size": 16384, "latent_channels": 256, "entry_size": 8}


def maskgit(side: int) -> tuple[MaskGITTransformer, dict[str, int]]:
    return MaskGITTransformer(TAMING["codebook_size"], NUM_CLASSES, (side, side)), TAMING


def halton(
    side: int, hidden_size: int, num_layers: int, num_heads: int, mlp_size: int
) -> tuple[HaltonMaskGITTransformer, dict[str, int]]:
    network = HaltonMaskGITTransformer(
        LLAMAGEN["codebook_size"], NUM_CLASSES, (side, side), hidden_size, num_layers, num_heads, mlp_size
    )
    return network, LLAMAGEN


RELEASED = {
    "maskgit-256": lambda: maskgit(16),
    "maskgit-512": lambda: maskgit(32),
    "halton-tiny-256": lambda: halton(16, 384, 6, 6, 1024),
    "halton-small-256": lambda: halton(16, 512, 12, 6, 1536),
    "halton-base-256": lambda: halton(16, 768, 12, 12, 2048),
    "halton-small-384": lambda: halton(24, 512, 12, 6, 1536),
    "halton-base-384": lambda: halton(24, 768, 12, 12, 2048),
    "halton-large-384": lambda: halton(24, 1024, 24, 16, 2816),
}


def random_components(name: str, seed: int = 0) -> dict[str, Any]:
    """What a `MaskedDiffusionPipeline` of a released teacher's sizes is made of, with random weights."""
    torch.manual_seed(seed)
    denoiser, vq = RELEASED[name]()
    height, width = denoiser.config.token_grid
    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 128, 256, 256, 512],
        "layers_per_block": 2,
        "latent_channels": vq["latent_channels"],
        "num_vq_embeddings": vq["codebook_size"],
        "vq_embed_dim": vq["entry_size"],
    }
    tokenizer = VQTokenizer((16 * height, 16 * width), settings)
    sampler = MaskGITSampler(num_inference_steps=8)
    return {"denoiser": denoiser.eval(), "tokenizer": tokenizer.eval(), "sampler": sampler}
