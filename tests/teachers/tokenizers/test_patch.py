import pytest
import torch

from teachers.tokenizers.patch import PatchTokenizer


def test_single_pixels_as_tokens_lose_nothing(digits):
    """The digits have 17 grey levels, so a codebook of 17 holds them all."""
    tokenizer = PatchTokenizer.fit(digits, patch_size=1, codebook_size=17)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(digits)), digits, atol=1e-4, rtol=0)


def test_patches_keep_their_place():
    images = torch.zeros(1, 3, 4, 6)
    images[0, :, 2:, 4:] = torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    tokenizer = PatchTokenizer.fit(images, patch_size=2, codebook_size=2)
    tokens = tokenizer.encode(images)
    assert (tokens == tokens[0, 0]).tolist() == [[True] * 5 + [False]]
    torch.testing.assert_close(tokenizer.decode(tokens), images)


def test_tokens_survive_decoding_and_encoding(digits):
    tokenizer = PatchTokenizer.fit(digits, patch_size=2, codebook_size=64)
    tokens = tokenizer.encode(digits)
    assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)
    assert len(tokens.unique()) == 64


def test_saved_and_loaded(digits, tmp_path):
    tokenizer = PatchTokenizer.fit(digits, patch_size=2, codebook_size=8)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PatchTokenizer.from_pretrained(tmp_path).encode(digits), tokenizer.encode(digits))


def test_impossible_requests(digits):
    with pytest.raises(ValueError, match="do not divide"):
        PatchTokenizer((8, 8), 1, 3, 16)
    with pytest.raises(ValueError, match="different"):
        PatchTokenizer.fit(digits, patch_size=1, codebook_size=18)
