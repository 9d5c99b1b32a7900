import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from teachers import MaskedDiffusionPipeline

CODEBOOK_SIZE, VOCABULARY_SIZE = 24, 32
CAPTIONS = ["a red apple", "a green car", "smiling face", "house"]


def tiny_text_encoder():
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = tokenizer.train_new_from_iterator(CAPTIONS, vocab_size=64)
    tokenizer.model_max_length = 12
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIPTextModelWithProjection(config).eval(), tokenizer


def tiny_vq():
    torch.manual_seed(1)
    return VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, vq_embed_dim=4,
        num_vq_embeddings=CODEBOOK_SIZE, mid_block_add_attention=False, lookup_from_codebook=True, force_upcast=True,
    ).eval()  # fmt: skip


def tiny_transformer(resampling=False):
    torch.manual_seed(2)
    return UVit2DModel(
        hidden_size=32, cond_embed_dim=16, micro_cond_embed_dim=1280, encoder_hidden_size=16, num_res_blocks=1,
        vocab_size=VOCABULARY_SIZE, codebook_size=CODEBOOK_SIZE, in_channels=16, block_out_channels=16,
        downsample=resampling, upsample=resampling, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, sample_size=4,
    ).eval()  # fmt: skip


def amused_folder(path, resampling=False):
    """What diffusers writes for an aMUSEd of 8x8 images, 4x4 tokens."""
    text_encoder, tokenizer = tiny_text_encoder()
    scheduler = AmusedScheduler(mask_token_id=VOCABULARY_SIZE - 1)
    AmusedPipeline(tiny_vq(), tokenizer, text_encoder, tiny_transformer(resampling), scheduler).save_pretrained(path)
    return path


@pytest.mark.parametrize("resampling", [False, True])
@torch.no_grad()
def test_an_amused_folder_of_diffusers_gives_the_same_logits_images_and_conditions(tmp_path, resampling):
    folder = amused_folder(tmp_path / "amused", resampling)
    pipe = MaskedDiffusionPipeline.from_pretrained(folder)
    theirs = AmusedPipeline.from_pretrained(folder)
    assert (pipe.mask_token_id, pipe.codebook_size, pipe.token_grid) == (31, CODEBOOK_SIZE, (4, 4))

    prompts = ["a red car", ""]
    tokens = torch.randint(0, CODEBOOK_SIZE, (2, 16))
    tokens[:, ::3] = 31
    ids = theirs.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt").input_ids
    encoded = theirs.text_encoder(ids, output_hidden_states=True)
    micro = torch.tensor([[8.0, 8, 0, 0, 6]] * 2)
    grid = tokens.view(2, 4, 4)
    expected = theirs.transformer(grid, encoded.hidden_states[-2], encoded.text_embeds, micro)
    logits = pipe.denoiser(tokens, pipe.encode_condition(prompts))
    torch.testing.assert_close(logits, expected.flatten(2).transpose(1, 2))
    doubled = pipe.denoiser(tokens, pipe.encode_condition(prompts), perturb=lambda embeddings: 2 * embeddings)
    assert not torch.allclose(logits, doubled)
    assert torch.equal(logits, pipe.denoiser(tokens, pipe.encode_condition(prompts)))  # the perturbation is gone

    codes = torch.randint(0, CODEBOOK_SIZE, (2, 16))
    images = theirs.vqvae.decode(codes.view(2, 4, 4), force_not_quantize=True, shape=(2, 4, 4, 4)).sample.clip(0, 1)
    torch.testing.assert_close(pipe.decode(codes), images)
    quantised = theirs.vqvae.quantize(theirs.vqvae.encode(images).latents)[2][2]
    assert torch.equal(pipe.encode(images).flatten(), quantised.flatten())
