from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier, get_ident

import pytest
import torch
from tiny_text import CAPTIONS, amused_folder, tiny_text_encoder

from teachers import MaskedDiffusionPipeline
from teachers.conditions import prompt_cache
from teachers.conditions.prompt_cache import PromptCache, prompts_key, write_prompt_cache
from teachers.conditions.prompts import encode_prompts, tokenize
from teachers.data import DataConfig, load_data

PROMPTS = ["a red apple", "a green car", "house", "house"]
MANY = [f"house {number % 90}" for number in range(100)]


@pytest.fixture
def encoder():
    return tiny_text_encoder()


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that were encoded, in order; at one that it names it stops, and threads meet before their first."""

    class Encoded(list):
        def __init__(self):
            super().__init__()
            self.stops_at, self.meeting, self.met = None, None, set()

        def __call__(self, text_encoder, text_tokenizer, prompts):
            if self.stops_at in prompts:
                raise KeyboardInterrupt
            if self.meeting is not None and get_ident() not in self.met:
                self.met.add(get_ident())
                self.meeting.wait(timeout=60)
            self.extend(prompts)
            return encode_prompts(text_encoder, text_tokenizer, prompts)

    encoded = Encoded()
    monkeypatch.setattr(prompt_cache, "encode_prompts", encoded)
    return encoded


def everything(folder):
    return PromptCache(folder, (8, 8)).condition(torch.arange(len(MANY)), "cpu")._tensors()


@torch.no_grad()
@pytest.mark.parametrize("shard_size", [2, 4096])
def test_cached_prompts_are_the_encoded_ones(tmp_path, shard_size):
    teacher = MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path / "amused"))
    modules = teacher.text_encoder, teacher.text_tokenizer
    folder = write_prompt_cache(tmp_path / "cache", *modules, PROMPTS, "green", batch_size=3, shard_size=shard_size)
    cache = PromptCache(folder, (8, 8))
    assert (len(cache), cache.prompts, cache.text_sizes) == (4, PROMPTS, (16, 16))
    cached = cache.condition(torch.tensor([3, 0, 2]), "cpu")
    fresh = teacher.encode_condition([PROMPTS[3], PROMPTS[0], PROMPTS[2]], negative_prompt="green")
    for ours, theirs in zip(cached._tensors(), fresh._tensors(), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=2e-3, rtol=2e-3)  # half precision
    assert torch.equal(cached.null().states, cached.null_states)
    some = cached.null(torch.tensor([True, False, False]))
    assert torch.equal(some.pooled[0], cached.null_pooled[0])
    assert torch.equal(some.pooled[1:], cached.pooled[1:])


def test_equal_prompts_are_encoded_once_and_for_all_runs(encoder, encoded, tmp_path):
    folder = write_prompt_cache(tmp_path, *encoder, MANY)
    assert encoded == ["", *MANY[:90]]
    assert write_prompt_cache(tmp_path, *encoder, MANY) == folder
    assert len(encoded) == 91
    assert write_prompt_cache(tmp_path, *encoder, MANY, "blurry") != folder
    assert len(encoded) == 2 * 91


def test_an_interruption_costs_the_shard_in_work(encoder, encoded, tmp_path):
    whole = write_prompt_cache(tmp_path / "whole", *encoder, MANY, batch_size=5, shard_size=10)
    encoded.clear()
    encoded.stops_at = "house 47"  # the 48th, and one before it is the negative prompt
    with pytest.raises(KeyboardInterrupt):
        write_prompt_cache(tmp_path, *encoder, MANY, batch_size=5, shard_size=10)
    (folder,) = set(tmp_path.iterdir()) - {tmp_path / "whole"}
    with pytest.raises(FileNotFoundError, match="complete"):
        PromptCache(folder, (8, 8))
    encoded.clear()
    encoded.stops_at = None
    assert write_prompt_cache(tmp_path, *encoder, MANY, batch_size=5, shard_size=10) == folder
    assert encoded == MANY[39:90]  # four shards of ten were whole
    assert all(map(torch.equal, everything(folder), everything(whole)))


def test_processes_share_the_prompts(encoder, encoded, tmp_path):
    """Threads in their place: locks are of open files, not of processes."""
    encoded.meeting = Barrier(3)
    encoders = [deepcopy(encoder) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        (folder,) = set(
            pool.map(lambda own: write_prompt_cache(tmp_path / "shared", *own, MANY, shard_size=10), encoders)
        )
    assert sorted(encoded) == sorted(["", *MANY[:90]])
    encoded.meeting = None
    alone = write_prompt_cache(tmp_path / "alone", *encoder, MANY, shard_size=10)
    assert all(map(torch.equal, everything(folder), everything(alone)))


def test_the_key_knows_all_that_the_encodings_depend_on(encoder):
    text_encoder, text_tokenizer = encoder
    keys = [
        prompts_key(text_encoder, text_tokenizer, prompts, negative)
        for prompts, negative in [
            (["a", "b"], ""), (["b", "a"], ""), (["a\nb"], ""), (["ab"], ""), (["b"], "a"), (["a", "b", "b"], ""),
        ]
    ]  # fmt: skip
    text_tokenizer.model_max_length = 11
    keys.append(prompts_key(text_encoder, text_tokenizer, ["a", "b"], ""))
    keys.append(prompts_key(text_encoder, text_tokenizer.train_new_from_iterator(["zzz"], 64), ["a", "b"], ""))
    text_tokenizer.pad_token = text_tokenizer.bos_token
    keys.append(prompts_key(text_encoder, text_tokenizer, ["a", "b"], ""))
    text_encoder.config.hidden_act = "gelu"
    keys.append(prompts_key(text_encoder, text_tokenizer, ["a", "b"], ""))
    with torch.no_grad():
        text_encoder.text_projection.weight[0, 0] += 1
    keys.append(prompts_key(text_encoder, text_tokenizer, ["a", "b"], ""))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)


def test_encoding_does_not_change_the_key(encoder):
    before = prompts_key(*encoder, CAPTIONS, "")
    tokenize(encoder[1], CAPTIONS)  # which sets padding and truncation
    assert prompts_key(*encoder, CAPTIONS, "") == before


def test_the_negative_prompt_is_read_once(encoder, tmp_path):
    cache = PromptCache(write_prompt_cache(tmp_path, *encoder, PROMPTS), (8, 8))
    first, second = (cache.condition(torch.tensor(rows), "cpu") for rows in ([0], [1, 2]))
    assert first.null_states.data_ptr() == second.null_states.data_ptr()
    assert first.null_pooled.data_ptr() == second.null_pooled.data_ptr()


def test_a_column_of_captions_is_encoded(encoder, pictures, tmp_path):
    settings = {"text_column": "text", "label_column": "", "num_channels": 3}
    texts = load_data(DataConfig(name=str(pictures), **settings)).texts
    cache = PromptCache(write_prompt_cache(tmp_path, *encoder, texts), (8, 8))
    assert cache.prompts == list(texts)
