import pytest
import torch
from diffusers import AmusedPipeline
from tiny_text import CODEBOOK_SIZE, amused_folder

from teachers import MaskedDiffusionPipeline


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
