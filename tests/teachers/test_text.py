"""Samplers on text, with a tiny BERT."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

from teachers import FirstHittingSampler, MaskGITSampler, PUNTSampler
from teachers.conditions.condition import ClassCondition
from teachers.text import MaskedLanguageDenoiser, fill_in_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "far", "away"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, SPECIAL, strict=True)))


@pytest.fixture
def denoiser(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return MaskedLanguageDenoiser(AutoModelForMaskedLM.from_config(config).eval(), tokenizer)


@pytest.mark.parametrize("sampler", [PUNTSampler(0.01), FirstHittingSampler(), MaskGITSampler(4)])
@pytest.mark.parametrize("block_length", [None, 2])
def test_prompts_stay_and_masks_become_words(tokenizer, denoiser, sampler, block_length):
    prompts = ["the cat [MASK] [MASK] [MASK] [MASK] mat", "a dog [MASK]"]
    generator = torch.Generator().manual_seed(0)
    texts, nfe = fill_in_text(denoiser, tokenizer, prompts, sampler, block_length=block_length, generator=generator)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text.split()) == len(prompt.split())
        for given, word in zip(prompt.split(), text.split(), strict=True):
            assert word == given if given != "[MASK]" else word in WORDS
    if not isinstance(sampler, MaskGITSampler):
        assert nfe[1] == 1


def test_padding_changes_nothing(tokenizer, denoiser):
    alone = tokenizer(["a dog [MASK]"], return_tensors="pt")["input_ids"]
    together = tokenizer(["a dog [MASK]", "the cat sat on the mat"], padding=True, return_tensors="pt")["input_ids"]
    condition = ClassCondition(torch.full((2,), -1))
    with torch.no_grad():
        expected = denoiser(alone, condition)[0]
        logits = denoiser(together, condition)[0, : len(expected)]
    possible = expected > -torch.inf
    torch.testing.assert_close(logits[possible], expected[possible])
    assert possible.sum(-1).unique().tolist() == [len(WORDS)]


def test_a_tokenizer_without_a_mask_is_refused(tokenizer, denoiser):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageDenoiser(denoiser.model, tokenizer)
