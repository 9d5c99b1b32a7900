"""A tiny aMUSEd, as diffusers writes it, and what it is made of."""

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

CODEBOOK_SIZE, VOCABULARY_SIZE = 24, 32
CAPTIONS = ["a red apple", "a green car", "smiling face", "house"]


def tiny_text_encoder(**sizes):
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = tokenizer.train_new_from_iterator(CAPTIONS, vocab_size=64)
    tokenizer.model_max_length = 12
    tiny = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 12,
    }  # fmt: skip
    config = CLIPTextConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **(tiny | sizes))
    torch.manual_seed(0)
    return CLIPTextModelWithProjection(config).eval(), tokenizer


def tiny_vq():
    torch.manual_seed(1)
    return VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, vq_embed_dim=4,
        num_vq_embeddings=CODEBOOK_SIZE, mid_block_add_attention=False, lookup_from_codebook=True, force_upcast=True,
    ).eval()  # fmt: skip


def tiny_transformer(resampling=False, text_width=16):
    torch.manual_seed(2)
    return UVit2DModel(
        hidden_size=32, cond_embed_dim=text_width, micro_cond_embed_dim=1280, encoder_hidden_size=text_width,
        num_res_blocks=1,
        vocab_size=VOCABULARY_SIZE, codebook_size=CODEBOOK_SIZE, in_channels=16, block_out_channels=16,
        downsample=resampling, upsample=resampling, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, sample_size=4,
    ).eval()  # fmt: skip


def amused_folder(path, resampling=False, **text_encoder_sizes):
    """What diffusers writes for an aMUSEd of 8x8 images, 4x4 tokens."""
    text_encoder, tokenizer = tiny_text_encoder(**text_encoder_sizes)
    transformer = tiny_transformer(resampling, text_encoder.config.hidden_size)
    scheduler = AmusedScheduler(mask_token_id=VOCABULARY_SIZE - 1)
    AmusedPipeline(tiny_vq(), tokenizer, text_encoder, transformer, scheduler).save_pretrained(path)
    return path
