import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from distill.config import load_config
from distill.jobs.clip import CLIPJob, CLIPNetworkConfig, make_text_tokenizer, vocabulary_of_run
from teachers.conditions.prompts import tokenize

CAPTIONS = ["a red apple", "a green car", "smiling face", "house"] * 3
START, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As it comes back from its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_text_tokenizer(CAPTIONS, CLIPNetworkConfig(num_text_tokens=16)).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@given(st.text(max_size=40))
def test_a_caption_ends_once_and_at_its_end(tokenizer, caption):
    for text in (caption, f"car{caption}", f"{caption} car", f"{caption}<|endoftext|>"):
        tokens = tokenizer(text, verbose=False).input_ids
        assert (tokens[0], tokens[-1]) == (START, END)
        assert not {START, END} & set(tokens[1:-1])


def test_letters_are_told_apart_within_words_and_at_their_ends(tokenizer):
    """Most of them were in no caption; each is lower case and as NFC writes it."""
    letters = [*"éßñøжщ日月qz7", "\U0001f600", "\U0001f601"]
    for word in ("{}", "{}a", "a{}"):
        assert len({tuple(tokenizer(word.format(letter)).input_ids) for letter in letters}) == len(letters)


def test_what_is_common_is_one_token(tokenizer):
    assert len(tokenizer("a green car").input_ids) == 5
    assert (
        tokenizer.decode(tokenizer("a green car \U0001f600").input_ids, skip_special_tokens=True)
        == "a green car \U0001f600"
    )
    tokens, num_cut = tokenize(tokenizer, ["a car", "house " * 30])
    assert (tokens.shape, num_cut) == (torch.Size([2, 16]), 1)
    assert tokens[0].tolist()[3:] == [END] * 13


def test_a_vocabulary_is_of_the_size_that_was_asked_for():
    assert len(make_text_tokenizer(CAPTIONS, CLIPNetworkConfig(vocabulary_size=520))) == 520
    assert len(make_text_tokenizer(CAPTIONS, CLIPNetworkConfig(vocabulary_size=514))) == 514
    with pytest.raises(ValueError, match="at least 514"):
        load_config(CLIPJob, overrides=["network.vocabulary_size=513"])


def test_a_run_goes_on_with_the_vocabulary_that_it_was_begun_with(tmp_path):
    config = CLIPNetworkConfig(vocabulary_size=520)
    begun = vocabulary_of_run(tmp_path, CAPTIONS, config)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    again = vocabulary_of_run(tmp_path, ["other words altogether"] * 9, config)
    assert again.get_vocab() == begun.get_vocab() == make_text_tokenizer(CAPTIONS, config).get_vocab()
    shutil.rmtree(tmp_path / "vocabulary")
    with pytest.raises(ValueError, match="no vocabulary folder"):
        vocabulary_of_run(tmp_path, CAPTIONS, config)
